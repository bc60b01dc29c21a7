"""A mesh in one process for tests of single things: started, stopped and asked by index.

Everything is decided by one seed, in virtual time. Whole lives under faults are mesh/simulation.py.
"""

import contextlib
from collections.abc import AsyncIterator
from random import Random

import numpy as np
import trio

from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.node import Node
from mesh.player import Player
from mesh.virtual_time import run_seeded

__all__ = ["MemoryMesh", "memory_mesh", "node_id", "run_seeded", "until"]


def node_id(index):
    return NodeId(f"node{index:02}" + "a" * 10)


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
        player = Player(x, weight=weight, sync_timeout_s=sync_timeout_s, run=run)
        await player.attach(self.nodes[index], shape or ())
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
