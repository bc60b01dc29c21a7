"""A mesh in one process: the deployed Node over the simulated network, under the autojump clock.

Everything is decided by one seed. A training is played by `Player`, which does with its two buffers
what mesh/training.py does with torch.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import trio
import trio.testing
from trio._core import _run as trio_run

from mesh.core.address import Address
from mesh.core.messages import (
    NodeId,
    SchemaEntry,
)
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.node import Node
from mesh.runs import Run, RunSpec


def run_seeded(main, seed, *args):
    """Runs `main(rng, *args)` in virtual time; the same seed gives the same run, task by task."""
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        clock = trio.testing.MockClock(autojump_threshold=0)
        return trio.run(main, Random(seed), *args, clock=clock)
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = False


def node_id(index):
    return NodeId(f"node{index:02}" + "a" * 10)


@dataclass
class Player:
    """A training that is played: it holds x, and obeys the hand-over's rule of turns."""

    node: Node
    posted: np.ndarray
    offered: np.ndarray
    x: np.ndarray
    run: Run | None = None
    begun: str | None = None
    events: list = field(default_factory=list)

    def tell(self, event):
        self.events.append(event)
        if event["event"] == "begun":
            self.begun = event["how"]
            if event["how"] == "donor":
                self.x[:] = self.offered
            self.posted[:] = self.offered

    async def post(self, progress=0.0, *, waits=False):
        """One boundary, if an offer is in hand."""
        self.x += progress
        if self.run.ours:
            return
        self.x += self.offered - self.posted
        self.posted[:] = self.x
        self.run.post(step=0, loss=None, samples=0)
        await self.node.posted(self.run, waits=waits)

    @property
    def weights(self):
        return self.run.replica.weights


class MemoryMesh:
    """Nodes that are started, stopped and asked by index."""

    def __init__(self, rng, nursery, weather=None):
        self.rng = rng
        self.network = SimulatedNetwork(rng, weather or Weather())
        self.nodes: dict[int, Node] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.notes: list[str] = []
        self._nursery = nursery
        self._incarnation = 1

    def start(self, index, *, discovery=True, candidates=()):
        me = node_id(index)
        self._incarnation += 10_000
        node = Node(
            node=me,
            name=f"n{index}",
            incarnation=self._incarnation,
            transport=SimulatedTransport(self.network, me, Address(f"10.0.0.{index}", 7710)),
            discovery=SimulatedDiscovery(self.network, me) if discovery else None,
            candidates=tuple(candidates),
            rng=Random(self.rng.random()),
            store_incarnation=lambda _: None,
            note=lambda text: self.notes.append(f"{trio.current_time():.3f} n{index}: {text}"),
        )
        self.nodes[index] = node
        self.scopes[index] = trio.CancelScope()
        self._nursery.start_soon(self._run, node, self.scopes[index])
        return node

    async def _run(self, node, scope):
        with scope:
            await node.run()

    def crash(self, index):
        """The process is gone between two words; its connections are reset."""
        self.scopes[index].cancel()
        return self.nodes.pop(index)

    async def attach(self, index, x, *, run="toy", weight=1.0, sync_timeout_s=2.0, shape=None):
        x = np.array(x, dtype=np.float32)
        spec = RunSpec(
            run=run,
            entries=(SchemaEntry(name="w", shape=shape or (len(x),), dtype="float32"),),
            weight=weight,
            every=1,
            sync_timeout_s=sync_timeout_s,
            pid=1,
            script="toy.py",
        )
        node = self.nodes[index]
        player = Player(node=node, posted=x.copy(), offered=np.empty_like(x), x=x)
        player.run = await node.attach(spec, player.posted, player.offered, player.tell)
        return player

    def states(self, index):
        """name -> state, as this node sees the others."""
        peers = self.nodes[index].statistics().protocol.peers
        return {peer.name: peer.state for peer in peers}


@contextlib.asynccontextmanager
async def memory_mesh(rng, count=0, weather=None, **start) -> AsyncIterator[MemoryMesh]:
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(rng, nursery, weather)
        for index in range(1, count + 1):
            mesh.start(index, **start)
        yield mesh
        nursery.cancel_scope.cancel()


async def until(condition, timeout_s=60.0, step_s=0.02):
    """Waits in virtual time."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 (a condition of many nodes has no one event)
            await trio.sleep(step_s)
