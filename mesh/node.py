"""Node: the one message loop, where core and net meet.

Rules: 1. Only _loop() touches the protocol; it never waits for the network. 2. Everything that
happens comes through one bounded inbox; everything that is asked for is performed by _perform().
3. One nursery; nothing outlives run(). 4. No clock but trio's, no chance but `rng`, no file: the
same code runs over TCP and over the simulated network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final, assert_never

import trio

from mesh.arrays import Floats
from mesh.codec import make_codecs
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.averaging import RUNS_LIMIT
from mesh.core.membership import first_row
from mesh.core.messages import Member, NodeId
from mesh.core.protocol import MeshProtocol
from mesh.core.statistics import ProtocolStatistics
from mesh.core.strategies import fragment_entries
from mesh.counters import Totals
from mesh.desk import Desk
from mesh.doors import Doors
from mesh.errors import (
    NotFinite,
    UsageError,
)
from mesh.inbox import Inbox
from mesh.initiator import Initiator
from mesh.journal import Journal
from mesh.links import Links, Peer
from mesh.net.transport import Candidate, Discovery, Transport
from mesh.observer import Observer
from mesh.replica import Replica
from mesh.responder import Responder
from mesh.run_statistics import RunStatistics, run_statistics
from mesh.runs import Run, RunSpec, Tell, make_run

INBOX_LIMIT: Final = 1024
"""Events that may wait for the loop; whoever brings more waits itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatistics:
    """Everything that can be asked of a node; consistent, because nothing here waits."""

    protocol: ProtocolStatistics
    runs: tuple[RunStatistics, ...]
    uptime_s: float
    refused: dict[str, int]
    dropped: int
    notes: tuple[str, ...]
    totals: Totals


class Node:
    """One member of the mesh. run() it, then ask statistics() and attach() trainings to it."""

    def __init__(
        self,
        *,
        node: NodeId,
        name: str,
        incarnation: int,
        transport: Transport,
        discovery: Discovery | None,
        candidates: tuple[tuple[str, Address], ...],
        rng: Random,
        store_incarnation: Callable[[int], None],
        note: Callable[[str], None],
    ) -> None:
        """`candidates`: (source, address) to begin with, source `peer` or `cache`; `incarnation`:
        the first of a block that no process of this node used; `note` gets a line per happening."""
        self.id = node
        self.name = name
        instance = rng.getrandbits(62)
        self._transport = transport
        self._discovery = discovery
        self._candidates = candidates
        self._store_incarnation = store_incarnation
        self._note = note
        self._codecs = make_codecs(rng)
        self._protocol = MeshProtocol(first_row(node, name, incarnation, ()), rng)
        self._inbox = Inbox[ev.Event](INBOX_LIMIT)
        self._links = Links(self._inbox.send)
        self._doors = Doors(
            transport,
            self._links,
            name=name,
            instance=instance,
            own=lambda: self._protocol.own,
            emit=self._inbox.send,
            refused=self.count_refused,
        )
        self._runs: dict[str, Run] = {}
        info_of, refused = self._protocol.run_info, self.count_refused
        self._initiator = Initiator(
            self._runs,
            connect=self._doors.connect_bulk,
            emit=self._inbox.send,
            info_of=info_of,
            refused=refused,
        )
        self._responder = Responder(
            node,
            self._runs,
            emit=self._inbox.send,
            info_of=info_of,
            out_of_turn=self._protocol.out_of_turn,
            refused=refused,
        )
        self.observer = Observer(self._protocol, self._initiator, self._runs, self._codecs, rng)
        self._doors.answer_bulk = self._responder.answer
        self._nursery: trio.Nursery | None = None
        self.journal = Journal(self._protocol.name_of)
        self.desk = Desk(self._inbox.send, rng)
        self._started_at = 0.0
        self.addresses: tuple[Address, ...] = ()
        self.listening = trio.Event()
        self._awaited: dict[int, trio.Event] = {}
        self._ended = False

    # ----------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Runs until cancelled. Cancel it after leave() to go politely."""
        self._started_at = self.journal.began_at = self._doors.began_at = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = self._links.nursery = nursery
                nursery.start_soon(self._transport.serve, self._doors.welcome, self._listens)
                await self.listening.wait()
                if self._discovery is not None:
                    nursery.start_soon(
                        self._discovery.run, lambda: self.addresses, self._candidate_found
                    )
                for source, address in self._candidates:
                    self._offer_event(ev.CandidateFound(addresses=(address,), source=source))
                nursery.start_soon(self._loop)
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self._initiator.close()

    async def leave(self) -> None:
        """Tells every peer that this node goes, and ends its connections."""
        await self._send_and_wait(ev.Leaving())
        await self._links.flush()

    def statistics(self) -> NodeStatistics:
        """A frozen view of this node."""
        now = trio.current_time()
        protocol = self._protocol.statistics(now)
        runs = tuple(
            run_statistics(run, protocol.partners.get(name, 0), now, self.journal.rates(run))
            for name, run in self._runs.items()
        )
        return NodeStatistics(
            protocol=protocol,
            runs=runs,
            uptime_s=now - self._started_at,
            refused=dict(self._links.refused),
            dropped=self._links.dropped,
            notes=self.journal.notes,
            totals=self._initiator.totals,
        )

    def members(self) -> tuple[Member, ...]:
        """All that are known and did not leave, this node first."""
        return self._protocol.members()

    def living_addresses(self, limit: int) -> list[Address]:
        """Where the living are, for the next start; cheap, however many there are."""
        return self._protocol.living_addresses(limit)

    # ----------------------------------------------------------------------------------- runs

    def check_run(self, spec: RunSpec) -> None:
        """Raises UsageError if this run cannot be attached."""
        if spec.run in self._runs:
            pid = self._runs[spec.run].spec.pid
            raise UsageError(
                f"run {spec.run!r} is being trained on this node already (pid {pid}); "
                "give this training another run= name, or its own node with --state"
            )
        if len(self._runs) >= RUNS_LIMIT:
            raise UsageError(f"{RUNS_LIMIT} trainings are attached to this node already")

    async def attach(
        self,
        spec: RunSpec,
        posted: Floats,
        offered: Floats,
        tell: Tell,
        kept: Floats | None = None,
    ) -> Run:
        """Begins a run whose training has filled `posted`; `tell` hears "begun" once its first
        weights are in `offered`. Raises UsageError, NotFinite. End it with detach()."""
        self.check_run(spec)
        replica, now = self._make_replica(spec, len(posted)), trio.current_time()
        partners = partial(self._protocol.partner_count, spec.run)
        run = make_run(spec, replica, self._codecs, posted, offered, tell, partners, now, kept)
        run.paused = self._protocol.paused(spec.run)
        self._runs[spec.run] = run
        try:
            await run.load()
        except BaseException as error:  # or the training went away meanwhile
            del self._runs[spec.run]
            if isinstance(error, NotFinite):
                raise UsageError(f"{error}; nothing was shared") from None
            raise
        await self._inbox.send(
            ev.RunAttached(
                run=spec.run,
                schema=spec.schema,
                entries=spec.entries,
                sync_timeout_s=spec.sync_timeout_s,
                started=spec.started,
                exchanged=spec.exchanged,
                strategy=spec.strategy,
                weight=spec.weight,
                posts=spec.step // spec.every,
            )
        )
        return run

    def _make_replica(self, spec: RunSpec, entries: int) -> Replica:
        """Where the simulator puts one that watches itself."""
        return Replica(entries, fragment_entries(spec.strategy, entries), spec.sizes)

    async def posted(self, run: Run, *, waits: bool) -> None:
        """Tells the schedule that a training handed over (Run.post() has merged it)."""
        if self._runs.get(run.name) is run:
            figures = self.journal.posted(run)
            await self._inbox.send(ev.Posted(run=run.name, waits=waits, figures=figures))

    async def detach(self, run: Run) -> None:
        """Drops a run; the node stays."""
        if self._runs.get(run.name) is run:
            run.ended = True
            # The name is free again only when the loop is done with it: nothing that was decided
            # for this run may reach the next one.
            await self._send_and_wait(ev.RunDetached(run=run.name))
            del self._runs[run.name]
            self._initiator.totals.run_ended(run.counters)

    @property
    def own(self) -> Member:
        """This node's own row."""
        return self._protocol.own

    @property
    def runs(self) -> Mapping[str, Run]:
        """Attached now, by name."""
        return self._runs

    def name_of(self, node: NodeId) -> str:
        """What a member calls itself."""
        return self._protocol.name_of(node)

    async def connect_bulk(self, peer: Member) -> Peer:
        """A connection of its own to a member, such as weights travel by. Raises StreamLost."""
        return await self._doors.connect_bulk(peer.node, peer.addresses)

    async def pause(self, run: Run, *, paused: bool) -> None:
        """Begins and answers no exchanges of a run from now on, or does so again."""
        run.paused = paused
        await self._send_and_wait(ev.PauseChanged(run=run.name, paused=paused))

    def exchanged(self, run: Run) -> bool:
        """Whether this run's weights have met another node's."""
        info = self._protocol.run_info(run.name)
        return info is not None and info.exchanged

    # ----------------------------------------------------------------------------------- loop

    async def _loop(self) -> None:
        try:
            while True:
                await self._turn()
        finally:
            self._ended = True
            for handled in self._awaited.values():
                handled.set()

    async def _next_event(self) -> ev.Event | None:
        """What happened next, or None when a deadline passed. The simulator stops a node here."""
        return await self._inbox.receive(self._protocol.next_deadline())

    async def _turn(self) -> None:
        event = await self._next_event()
        now = trio.current_time()
        if event is None:
            effects = self._protocol.on_deadline(now)
        else:
            effects = self._protocol.handle(event, now)
            self.journal.saw(event, self._runs)
        for effect in effects:
            self._perform(effect)
        if (handled := self._awaited.pop(id(event), None)) is not None:
            handled.set()

    async def _send_and_wait(self, event: ev.Event) -> None:
        """Returns when the loop has handled the event and performed its effects, or has ended."""
        if self._ended:
            return
        self._awaited[id(event)] = handled = trio.Event()
        await self._inbox.send(event)
        await handled.wait()

    def _perform(self, effect: ev.Effect) -> None:
        assert self._nursery is not None
        match effect:
            case ev.Dial():
                self._nursery.start_soon(self._doors.dial, effect)
            case ev.Send():
                self._links.send(effect.connection, effect.message)
            case ev.Hangup():
                self._links.hang_up(effect.connection, effect.reason)
            case ev.BreakOff():
                self._initiator.break_off(effect.node)
            case ev.Abandon():
                self._links.abandon(effect.node)
                self._responder.drop(effect.node)
                self._initiator.break_off(effect.node)
                self._nursery.start_soon(self._initiator.drop, effect.node)
            case ev.Stop():
                raise UsageError(effect.reason)
            case ev.DropExchange():
                if effect.run in self._runs:
                    self._runs[effect.run].unfinished.pop(effect.peer, None)
            case ev.StartExchange():
                self._nursery.start_soon(self._initiator.initiate, effect)
            case ev.Begin():
                if effect.run in self._runs:
                    donor = self._protocol.name_of(effect.donor) if effect.donor else None
                    run = self._runs[effect.run]
                    run.how = effect.how
                    self.journal.begun(effect)
                    self._nursery.start_soon(run.begin, donor)
            case ev.Offer():
                if effect.run in self._runs:
                    self._nursery.start_soon(self._runs[effect.run].offer)
            case ev.Perform():
                self._nursery.start_soon(self.desk.perform, effect)
            case ev.Told():
                self.desk.told(effect)
            case ev.StoreIncarnation():
                self._store_incarnation(effect.incarnation)
            case ev.Note():
                for text in self.journal.note(effect):
                    self._note(text)
            case _:
                assert_never(effect)

    # ---------------------------------------------------------------------------- connections

    def count_refused(self, kind: str) -> None:
        """Counts something that was turned away, under one of a few kinds."""
        self._links.refused[kind] += 1
        self.journal.refused(kind)

    def _listens(self, addresses: tuple[Address, ...]) -> None:
        self.addresses = addresses
        self._offer_event(ev.AddressesChanged(addresses=addresses))
        self.listening.set()

    def _candidate_found(self, candidate: Candidate) -> None:
        addresses, hint = candidate.addresses, candidate.hint
        self._offer_event(ev.CandidateFound(addresses=addresses, source="mdns", hint=hint))

    def _offer_event(self, event: ev.Event) -> None:
        """For callers that cannot wait; what does not fit will be said again by its source."""
        try:
            self._inbox.send_nowait(event)
        except trio.WouldBlock:
            self._links.dropped += 1
