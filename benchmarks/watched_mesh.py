"""A mesh of deployed nodes in virtual time, and who says what of whom in it.

Owns the nodes of one seed, what befalls them, and the record of it. Rules: 1. The nodes, the loop and
the failure detector are the deployed ones; only what they say is written down. 2. Nothing is averaged:
no training is attached. 3. All machines are in one place; nothing waits for real time.

A verdict's trip: the core's Membership.declare() -> `accused` or `declared`; a row that says dead in a
node's table -> looked() after that node's turn -> `dead_at`.
"""

import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random

import trio

from mesh import wire
from mesh.core import events as ev
from mesh.core.messages import Member, NodeId, State
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.node import Node
from mesh.simulated_mesh import address_of, node_id

SETTLE_S = 120.0
"""How long a mesh may take to become one before this benchmark calls it broken."""

INCARNATIONS = 10_000
"""Between two starts of one node: more than it can use up in one life here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One node's own finding about another."""

    at: float
    by: NodeId
    of: NodeId


@dataclass(slots=True)
class Traffic:
    """What the nodes of a mesh said, and what deciding it cost."""

    messages: int = 0
    bytes: int = 0
    core_s: float = 0.0


@dataclass(slots=True)
class Watch:
    """Who listed the watched node as dead, and when."""

    of: NodeId
    dead_at: dict[NodeId, float] = field(default_factory=dict)
    complete: trio.Event = field(default_factory=trio.Event)


class WatchedNode(Node):
    """The deployed node, stopped by network.stall(), with an ear at its core."""

    def watched_by(self, mesh: "WatchedMesh") -> None:
        self._mesh = mesh
        membership = self._protocol.peers.membership
        declare = membership.declare

        def declared(node: NodeId, state: State, now: float = 0.0) -> Member | None:
            row = declare(node, state, now)
            if row is not None:
                verdicts = mesh.declared if state is State.DEAD else mesh.accused
                verdicts.append(Verdict(at=now, by=self.id, of=node))
            return row

        membership.declare = declared

    @property
    def incarnation(self) -> int:
        return self._protocol.own.incarnation

    @property
    def table(self) -> dict[NodeId, Member]:
        return self._protocol.peers.membership.others

    @property
    def round_s(self) -> float:
        """How long it takes this node to probe each of those that it watches."""
        return float(len(self._protocol.peers.detector._watches))

    async def _next_event(self) -> ev.Event | None:
        self._mesh.looked(self)
        event = await super()._next_event()
        await self._mesh.network.awake(self.id)
        return event

    def _perform(self, effect: ev.Effect) -> None:
        traffic = self._mesh.traffic
        if traffic is not None and isinstance(effect, ev.Send):
            traffic.messages += 1
            traffic.bytes += len(wire.encode(effect.message, 0))
        super()._perform(effect)

    def time_core(self) -> None:
        """Adds up from now on what the pure core takes of the CPU."""
        protocol = self._protocol
        protocol.handle = self._timed(protocol.handle)
        protocol.on_deadline = self._timed(protocol.on_deadline)

    def _timed(self, method):
        depth = 0

        def timed(*arguments):
            nonlocal depth
            depth += 1
            began = time.thread_time()
            try:
                return method(*arguments)
            finally:
                depth -= 1
                traffic = self._mesh.traffic
                if traffic is not None and not depth:  # handle() calls on_deadline() itself
                    traffic.core_s += time.thread_time() - began

        return timed


class WatchedMesh:
    """`count` nodes by index, from 1."""

    def __init__(self, rng: Random, nursery: trio.Nursery, count: int) -> None:
        self.rng = rng
        self.network = SimulatedNetwork(Random(rng.random()), Weather())
        self.nodes: dict[NodeId, WatchedNode] = {}
        self.accused: list[Verdict] = []
        self.declared: list[Verdict] = []
        self.traffic: Traffic | None = None
        self._scopes: dict[NodeId, trio.CancelScope] = {}
        self._starts: dict[NodeId, int] = {}
        self._nursery = nursery
        self._watch: Watch | None = None
        for index in range(1, count + 1):
            self.start(node_id(index))

    def start(self, me: NodeId) -> None:
        index = int(me[4:8])
        self._starts[me] = self._starts.get(me, 0) + 1
        node = WatchedNode(
            node=me,
            name=f"n{index}",
            incarnation=self._starts[me] * INCARNATIONS,
            transport=SimulatedTransport(self.network, me, address_of(index)),
            discovery=SimulatedDiscovery(self.network, me),
            candidates=(),
            rng=Random(self.rng.random()),
            store_incarnation=lambda _: None,
            note=lambda _: None,
        )
        node.watched_by(self)
        self.nodes[me], self._scopes[me] = node, trio.CancelScope()
        self._nursery.start_soon(self._live, node, self._scopes[me])

    async def _live(self, node: WatchedNode, scope: trio.CancelScope) -> None:
        with scope:
            await node.run()

    def end(self, victim: NodeId, *, silent: bool) -> Watch:
        """kill -9, or (`silent`) a power cut; the watch says who lists it as dead, and when."""
        (self.network.vanish if silent else self.network.crash)(victim)
        self._scopes.pop(victim).cancel()
        del self.nodes[victim]
        self._watch = Watch(of=victim)
        return self._watch

    def looked(self, node: WatchedNode) -> None:
        """After each turn of a node: whether it lists the watched one as dead by now."""
        watch = self._watch
        if watch is None or node.id in watch.dead_at or node.id not in self.nodes:
            return
        row = node.table.get(watch.of)
        if row is not None and row.state is State.DEAD:
            watch.dead_at[node.id] = trio.current_time()
            if len(watch.dead_at) == len(self.nodes):
                watch.complete.set()

    async def settle(self) -> None:
        """Returns when everybody lists everybody as alive. Raises trio.TooSlowError."""
        with trio.fail_after(SETTLE_S):
            while not self._settled():  # noqa: ASYNC110 (a state of many nodes has no one event)
                await trio.sleep(0.25)

    def _settled(self) -> bool:
        living = set(self.nodes)
        for node in self.nodes.values():
            alive = {n for n, row in node.table.items() if row.state is State.ALIVE}
            if alive != living - {node.id}:
                return False
        return True

    async def live_rounds(self, rounds: float) -> None:
        """Lets everybody probe everybody `rounds` times, and stops at no particular moment."""
        longest_s = max(node.round_s for node in self.nodes.values())
        await trio.sleep(rounds * longest_s + self.rng.random())


@contextlib.asynccontextmanager
async def watched_mesh(rng: Random, count: int) -> AsyncIterator[WatchedMesh]:
    """A mesh that has become one."""
    async with trio.open_nursery() as nursery:
        mesh = WatchedMesh(rng, nursery, count)
        await mesh.settle()
        yield mesh
        nursery.cancel_scope.cancel()


def percentile(values: list[float], part: float) -> float:
    """The smallest value that is not below `part` of all (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
