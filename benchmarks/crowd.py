"""A mesh of deployed nodes in one process, one of which the shell can ask like any node of this machine:

    python -m benchmarks.crowd '{"state": "DIR", "nodes": 100}'

Nodes, runs and exchanges are the deployed ones over the simulated network; so are the answers and the
local socket. First they live in virtual time, until the node that is asked knows how the others do; then
the clock goes on with the real one, slowly, and the socket opens. Rules: 1. One seed decides everything
until the socket opens. 2. It ends with its standard input.
An answer's trip: LivedClock.live() -> Control.serve() -> Answers -> `mesh peers`.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import trio
from trio._core import _run as trio_run

from mesh.alarm import JumpClock
from mesh.answers import Answers
from mesh.control import Control, listen
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.node import Node
from mesh.player import Player
from mesh.simulated_mesh import address_of, node_id
from mesh.simulation import TICK_S
from mesh.storage import StateDirectory

MESH = "c0wdc0wd"
SEED = 1
ENTRIES = 16
"""Of each model: what is measured here are answers about runs, not exchanges."""

PERIOD_S = 4.0
"""Between two hand-overs of a training: exchanges are a large part of what a virtual second costs."""

KNOWN = 0.6
KNOWN_WITHIN_S = 60.0
"""Of how many others the figures are waited for, and how long in virtual time: those that are told last take
longer than all before them."""

PACE = 0.05
"""Seconds of the nodes in a real one while they are asked. At full speed all of them would take half a core;
the one that is asked has that for itself where the others are on machines of their own."""


class LivedClock(JumpClock):
    """Jumps, until live() is called: from then on it goes with the real one, PACE as fast."""

    def __init__(self) -> None:
        super().__init__(tick_s=TICK_S)
        self._since: float | None = None

    def live(self) -> None:
        self._since, self._tick_s = time.monotonic() - self._now / PACE, 0.0

    def current_time(self) -> float:
        if self._since is not None:
            self._now = PACE * (time.monotonic() - self._since)
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if self._since is None:
            return super().deadline_to_sleep_time(deadline)
        now = self.current_time()
        alarm = self._alarms[0][0] if self._alarms else deadline
        if alarm <= now:
            return super().deadline_to_sleep_time(now)  # which rings it
        return max(0.0, min(deadline, alarm) - now) / PACE


@dataclass(slots=True)
class Crowd:
    """Nodes by index, from 1, each with a training."""

    rng: Random
    network: SimulatedNetwork
    nodes: dict[int, Node] = field(default_factory=dict)

    def start(self, nursery: trio.Nursery, index: int) -> None:
        me = node_id(index)
        node = Node(
            node=me,
            name=f"n{index:03}",
            incarnation=10_000,
            transport=SimulatedTransport(self.network, me, address_of(index)),
            discovery=SimulatedDiscovery(self.network, me),
            candidates=(),
            rng=Random(self.rng.random()),
            store_incarnation=lambda unused: None,
            note=lambda text: None,
        )
        self.nodes[index] = node
        nursery.start_soon(node.run)
        nursery.start_soon(self._train, node, index)

    async def _train(self, node: Node, index: int) -> None:
        """A loss that falls, on a model that only exchanges move."""
        await node.listening.wait()
        player = Player(np.full(ENTRIES, index, dtype=np.float32), run="digits", sync_timeout_s=0)
        player.began, player._met = "donor", True  # they met before: nobody looks for weights
        await player.attach(node)
        while True:
            if player.begun is not None:
                await player.run.offer()
                player.steps += 8
                player.samples = 8 * player.steps
                player.loss = 2.0 / (1 + player.steps / index)
                await player.post()
            await trio.sleep(PERIOD_S * self.rng.uniform(0.9, 1.1))

    async def known(self) -> None:
        """Returns when the first node lists all as alive and knows how they do."""
        with trio.fail_after(KNOWN_WITHIN_S):
            while not self._known():  # noqa: ASYNC110 (a state of many nodes has no one event)
                await trio.sleep(0.25)

    def _known(self) -> bool:
        peers = self.nodes[1].statistics().protocol.peers
        alive = [peer for peer in peers if peer.state == "alive"]
        others = len(self.nodes) - 1
        return len(alive) == others and sum(bool(p.figures) for p in alive) >= KNOWN * others


@contextlib.asynccontextmanager
async def crowd(rng: Random, count: int) -> AsyncIterator[Crowd]:
    """A mesh that has become one."""
    async with trio.open_nursery() as nursery:
        mesh = Crowd(rng, SimulatedNetwork(Random(rng.random()), Weather()))
        for index in range(1, count + 1):
            mesh.start(nursery, index)
        await mesh.known()
        yield mesh
        nursery.cancel_scope.cancel()


async def _serve(clock: LivedClock, state: Path, count: int) -> None:
    storage = StateDirectory(state)
    storage.lock()
    path, stop = state / "control.sock", trio.Event()
    try:
        async with crowd(Random(SEED), count) as mesh, trio.open_nursery() as nursery:
            answers = [
                Answers(node, mesh=MESH, state=state, stop=stop.set) for node in mesh.nodes.values()
            ]
            node = mesh.nodes[1]
            about = {"lived_s": trio.current_time(), "cpu_s": time.process_time()}
            clock.live()
            nursery.start_soon(Control(node, answers[0]).serve, listen(path))
            nursery.start_soon(_end_with_input, stop)
            storage.announce(node.id, node.name, str(path))
            print(json.dumps(about), flush=True)
            await stop.wait()
            nursery.cancel_scope.cancel()
    finally:
        storage.unlock()


async def _end_with_input(stop: trio.Event) -> None:
    while True:
        await trio.lowlevel.wait_readable(0)
        if not os.read(0, 4096):
            stop.set()
            return


def main() -> int:
    order = json.loads(sys.argv[1])
    clock = LivedClock()
    # As mesh/virtual_time.py: tasks run in an order that the seed decides.
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(SEED)
    trio.run(_serve, clock, Path(order["state"]), order["nodes"], clock=clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
