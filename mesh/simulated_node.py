"""The deployed node with eyes: what it handles and does is traced, and its limits are checked.

A turn's trip: _next_event() -> the last turn is checked, the event is traced -> the base class
handles it -> _perform() -> each effect is traced. Rules: 1. Nothing here changes what a node does.
2. A check costs as much as the event was large, never as much as the mesh is.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from mesh.core import events as ev
from mesh.core.membership import INCARNATION_LIMIT
from mesh.core.messages import WINDOW, Member, Members, NodeId, State
from mesh.ledger import Ledger, WatchedReplica, WatchedResponses
from mesh.net.simulated import SimulatedNetwork
from mesh.node import INBOX_LIMIT, Node
from mesh.replica import Replica
from mesh.runs import Run, RunSpec

TRACE_KEPT: Final = 50
"""Lines that are shown when a run fails: about the last hundredth of a second."""

SPINS: Final = 100
"""Deadlines in a row at one moment of virtual time: each of them should move the next one on."""

TASKS_EACH: Final = 12
TASKS_BASE: Final = 16
"""Tasks that a node may hold for each other node: two control connections while one replaces the
other, a dial, bulk connections both ways and their last words."""


class Trace:
    """All that happened, one line each: a digest of everything, and the last lines."""

    def __init__(self, *, on: bool = True, to: Callable[[str], None] | None = None) -> None:
        """`on`: formatting every line costs a tenth of a run. `to` hears each line as well."""
        self.on = on
        self.lines: deque[str] = deque(maxlen=TRACE_KEPT)
        self.count = 0
        self._to = to
        self._hash = hashlib.sha256()

    def add(self, name: str, what: str) -> None:
        line = f"{trio.current_time():.6f} {name} {what}"
        self.count += 1
        self.lines.append(line)
        self._hash.update(line.encode())
        if self._to is not None:
            self._to(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()[:32]


def describe(happening: ev.Event | ev.Effect | None) -> str:
    """An event or an effect in one short line."""
    match happening:
        case None:
            return "deadline"
        case ev.Received():
            return f"Received #{happening.connection} {type(happening.message).__name__}"
        case ev.Send():
            message = happening.message
            if isinstance(message, Members):
                rows = " ".join(f"{m.name}:{m.state.name}:{m.incarnation}" for m in message.members)
                said = f"Members {rows}"
            else:
                said = repr(message)
            return f"{type(happening).__name__} #{happening.connection} {said}"
        case ev.PeerConnected():
            row = happening.hello.member
            return f"PeerConnected #{happening.connection} {row.name}:{row.incarnation}"
        case ev.Dial():
            return f"Dial {happening.contact}"
        case ev.RunAttached():
            return f"RunAttached started={happening.started} exchanged={happening.exchanged}"
        case _:
            return repr(happening)


class SimulatedNode(Node):
    """One member of a simulated mesh. Its arguments, and what watches it."""

    def watched_by(
        self,
        ledger: Ledger,
        trace: Trace,
        network: SimulatedNetwork,
        fail: Callable[[str], None],
        nodes: int,
    ) -> None:
        """Before run(). `nodes`: how many there are in all, which bounds what each may hold."""
        self._ledger, self._trace, self._network, self._fail = ledger, trace, network, fail
        self._most = TASKS_BASE + TASKS_EACH * nodes
        self._own_incarnation = 0
        self._before: dict[NodeId, Member | None] = {}
        self._heard: tuple[Member, ...] = ()
        self.turns = self._spins = 0
        self._turned_at = 0.0

    # ------------------------------------------------------------------------- seams of the node

    def _make_replica(self, spec: RunSpec, entries: int) -> Replica:
        replica = WatchedReplica(entries, self.id, spec.weight, self._ledger)
        self._ledger.born(replica)
        return replica

    async def _next_event(self) -> ev.Event | None:
        self._check_turn()
        event = await super()._next_event()
        await self._network.awake(self.id)
        self.turns += 1
        now = trio.current_time()
        self._spins = self._spins + 1 if event is None and now == self._turned_at else 0
        self._turned_at = now
        if self._spins > SPINS:
            self._fail(f"{self.name} spins: a deadline has passed and nothing is done about it")
        if self._trace.on:
            self._trace.add(self.name, describe(event))
        self._heard = ()
        if type(event) is ev.Received and type(event.message) is Members:
            current = self._protocol.peers.contacts.connections.get(event.node)
            # What a connection says that was replaced is not listened to.
            if current is not None and current.number == event.connection:
                self._heard = event.message.members
                others = self._protocol.peers.membership.others
                self._before = {row.node: others.get(row.node) for row in self._heard}
        return event

    def _perform(self, effect: ev.Effect) -> None:
        if self._trace.on:
            self._trace.add(self.name, "  " + describe(effect))
        if isinstance(effect, ev.Begin) and effect.run in self._runs:
            run = self._runs[effect.run]
            assert isinstance(run.replica, WatchedReplica)
            if run.replica.run is None:
                # Until it has begun, a responder refuses everybody: nothing is lost.
                WatchedResponses.instead_of(run, run.replica, self._ledger)
        super()._perform(effect)

    # ------------------------------------------------------------------------------------ checks

    def _check_turn(self) -> None:
        own = self._protocol.own
        if own.incarnation < self._own_incarnation:
            self._fail(f"{self.name} lowered its incarnation to {own.incarnation}")
        self._own_incarnation = own.incarnation
        for row in self._heard:
            self._check_row(row, own)
        self._check_growth()
        for run in self._runs.values():
            self._check_run(run)

    def _check_growth(self) -> None:
        waiting = self._inbox.waiting
        tasks = len(self._nursery._children) if self._nursery else 0
        if waiting > INBOX_LIMIT or tasks > self._most or len(self._links._links) > self._most:
            self._fail(
                f"{self.name} grows: {waiting} events, {tasks} tasks, {len(self._links._links)} links"
            )

    def _check_row(self, row: Member, own: Member) -> None:
        """A table's row is the largest (incarnation, state) that was heard; of oneself, larger."""
        if row.incarnation >= INCARNATION_LIMIT:
            return
        said = row.incarnation, row.state
        if row.node == self.id:
            if own.state is not State.LEFT and said > (own.incarnation, own.state):
                self._fail(f"{self.name} heard that it is {row.state.name} and let it stand")
            return
        now, before = self._protocol.peers.membership.others.get(row.node), self._before[row.node]
        if now is None:
            return  # the table is full
        held = now.incarnation, now.state
        if held < said or (before is not None and held < (before.incarnation, before.state)):
            was = before and (before.incarnation, before.state.name)
            self._fail(
                f"{self.name} knew {was} of {row.name}, heard {said[0], row.state.name} and holds "
                f"{held[0], now.state.name}"
            )

    def _check_run(self, run: Run) -> None:
        for record in run.initiated:
            if len(record.in_doubt) > WINDOW:
                self._fail(f"{self.name} has {len(record.in_doubt)} fragments in doubt")
        if len(run.buffers._free) > WINDOW * self._most:
            self._fail(f"{self.name} hoards {len(run.buffers._free)} buffers")
