"""Exchanges that this node begins: connections, attempts, what is kept for later.

A trip: StartExchange -> initiate() -> a bulk connection, kept from the last time or new ->
conversation.py -> ExchangeEnded. A broken connection is dialled again and the exchange resumed; if
the peer stays away, what is in doubt is kept and finished with it when it is back.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

import trio

from mesh.codec import EXACT
from mesh.conversation import FRAGMENT_S, Conversation, Refused
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.exchange import Initiation
from mesh.core.messages import (
    NodeId,
    RunInfo,
)
from mesh.core.strategies import part_of
from mesh.counters import Totals
from mesh.errors import NotFinite, RemoteProtocolError, StreamLost
from mesh.frames import FrameReader
from mesh.links import Peer
from mesh.net.transport import Stream
from mesh.runs import Run

ATTEMPTS: Final = 3
"""Connections that may break in a row without one delta, before others get their turn."""

RETRY_S: Final = 0.2
IDLE_LIMIT: Final = 64
"""Bulk connections kept for the next exchange with the same peer: a handshake takes 10 ms."""

Connect = Callable[[NodeId, tuple[Address, ...]], Awaitable[Peer]]
Emit = Callable[[ev.Event], Awaitable[None]]


class Initiator:
    """Begins the exchanges of one node."""

    def __init__(
        self,
        runs: Mapping[str, Run],
        *,
        connect: Connect,
        emit: Emit,
        info_of: Callable[[str], RunInfo | None],
        refused: Callable[[str], None],
    ) -> None:
        """`connect` opens a greeted bulk connection; `info_of` is what this node says of its runs;
        `refused` counts what peers did wrong."""
        self._runs = runs
        self._connect = connect
        self._emit = emit
        self._info_of = info_of
        self._refused = refused
        self.totals = Totals()
        self._idle: dict[NodeId, tuple[Stream, FrameReader]] = {}
        """the one that was used longest ago comes first"""
        self._scopes: dict[NodeId, list[trio.CancelScope]] = {}
        """of the exchanges under way"""

    async def initiate(self, start: ev.StartExchange) -> None:
        """Performs one StartExchange and reports its ExchangeEnded."""
        run = self._runs.get(start.run)
        if run is None:
            return
        began = trio.current_time()
        record = self._record(run, start)
        run.current = record
        if start.pull:
            record.goes_on_at(run.take_up(start.peer, resumes=start.resumes, now=began))
        first = record.applied
        try:
            outcome, reason = await self._drive_until_broken_off(
                run, record, start.addresses, lambda: self._current_info(run)
            )
            if outcome is ev.Outcome.COMPLETED:
                await self._settle(run, record, start)
            elif start.pull:
                run.broke_off(record, resumes=start.resumes, now=trio.current_time())
        finally:
            run.current, run.taken = None, run.taken[:0].copy()  # a copy: the buffer goes
        self._count(run, record, outcome)
        duration_s = trio.current_time() - began
        self.totals.exchanges[outcome].add(duration_s)
        if self._runs.get(start.run) is run:
            await self._emit(
                ev.ExchangeEnded(
                    run=start.run,
                    peer=start.peer,
                    pull=start.pull,
                    outcome=outcome,
                    reason=reason,
                    duration_s=duration_s,
                    square_distance=record.square_distance,
                    square_norm=run.replica.square_norm(),
                    clip=record.clip,
                    ahead=record.ahead,
                    turn=record.turn,
                    brought=record.applied - first,
                )
            )

    async def _settle(self, run: Run, record: Initiation, start: ev.StartExchange) -> None:
        """What a strategy does with a replica once an exchange has brought it all."""
        if record.clip:
            record.square_distance = await run.mix_clipped()
        elif start.pull:
            await run.fill()
        elif not start.rest:
            await run.step_outer()

    async def observe(
        self, run: Run, record: Initiation, addresses: tuple[Address, ...], info: RunInfo
    ) -> tuple[ev.Outcome, str]:
        """A pull for a run that nobody trains here (observer.py); what it brings goes to run.taken."""
        return await self._drive_until_broken_off(run, record, addresses, lambda: info)

    async def close(self) -> None:
        """Ends the idle connections."""
        for stream, _ in self._idle.values():
            await stream.aclose()
        self._idle.clear()

    def break_off(self, peer: NodeId) -> None:
        """The peer may be gone: its exchanges end here as if their connections had broken."""
        for scope in self._scopes.get(peer, []):
            scope.cancel()

    async def drop(self, peer: NodeId) -> None:
        """The peer is dead: a connection that idles for it is none."""
        pooled = self._idle.pop(peer, None)
        if pooled is not None:
            await pooled[0].aclose()

    def _record(self, run: Run, start: ev.StartExchange) -> Initiation:
        """The unfinished exchange with this peer, or a new one."""
        unfinished = None if start.pull else run.unfinished.pop(start.peer, None)
        if unfinished is not None:
            run.counters.resumed += 1
            return unfinished
        fragments = run.replica.fragments
        first, end = (0, fragments) if start.part is None else part_of(fragments, start.part)
        return Initiation(
            exchange=start.exchange,
            peer=start.peer,
            first=first,
            end=end,
            pull=start.pull,
            codec=EXACT if start.pull or start.rest else run.spec.codec,
            clip=start.clip,
            turn=start.turn,
            weight=start.weight,
            reach=run.reach(),
            clock=run.clock.steps,
        )

    def _count(self, run: Run, record: Initiation, outcome: ev.Outcome) -> None:
        match outcome:
            case ev.Outcome.COMPLETED:
                run.counters.completed += 1
                run.counters.pulled += record.pull
                run.exchanged_at, run.last_peer = trio.current_time(), record.peer
                if record.clip or not record.pull:
                    run.distances.append(record.square_distance)
                if not record.pull:
                    run.guard.heard(record.square_distance)
            case ev.Outcome.REFUSED:
                run.counters.refused += 1
            case ev.Outcome.INTERRUPTED:
                run.unfinished[record.peer] = record
                run.counters.failed += 1
            case ev.Outcome.ABANDONED:
                run.counters.failed += 1

    async def _drive_until_broken_off(
        self,
        run: Run,
        record: Initiation,
        addresses: tuple[Address, ...],
        info_now: Callable[[], RunInfo | None],
    ) -> tuple[ev.Outcome, str]:
        scopes = self._scopes.setdefault(record.peer, [])
        with trio.CancelScope() as scope:
            scopes.append(scope)
            try:
                return await self._drive(run, record, addresses, info_now)
            finally:
                scopes.remove(scope)
                if not scopes:
                    self._scopes.pop(record.peer, None)
        record.connection_lost()
        return self._broken(record), "the peer may be gone"

    @staticmethod
    def _broken(record: Initiation) -> ev.Outcome:
        if record.done:
            # Only our last word was lost: the next exchange says as much.
            return ev.Outcome.COMPLETED
        return ev.Outcome.INTERRUPTED if record.in_doubt else ev.Outcome.ABANDONED

    async def _drive(
        self,
        run: Run,
        record: Initiation,
        addresses: tuple[Address, ...],
        info_now: Callable[[], RunInfo | None],
    ) -> tuple[ev.Outcome, str]:
        """Connections, one after the other, until the exchange is over."""
        reason, attempts = "", 0
        while attempts < ATTEMPTS:
            info = info_now()
            if info is None:
                return ev.Outcome.ABANDONED, "the run ended here"
            applied, began = record.applied, trio.current_time()
            try:
                async with self.stream_to(record.peer, addresses) as (stream, reader):
                    await Conversation(run, record, stream, reader).hold(info)
                return ev.Outcome.COMPLETED, ""
            except Refused as refusal:
                # Only exact rounds have places in them: anybody else is refused like any other.
                record.ahead = refusal.position if record.turn else None
                # Who knows of another place has not begun this one: some peers say only that.
                if record.in_doubt and not refusal.unknown and refusal.position is None:
                    record.connection_lost()
                    return ev.Outcome.INTERRUPTED, str(refusal)
                return ev.Outcome.REFUSED, str(refusal)
            except NotFinite as error:
                run.counters.non_finite += 1
                return ev.Outcome.ABANDONED, str(error)
            except RemoteProtocolError as error:
                self._refused("protocol")
                return ev.Outcome.ABANDONED, str(error)
            except StreamLost as error:
                if record.done:
                    return self._broken(record), ""
                reason = str(error)
                run.counters.resumed += bool(record.sent_once)
                record.connection_lost()
                attempts = 1 if record.applied > applied else attempts + 1
                if record.applied == applied and trio.current_time() - began >= FRAGMENT_S:
                    break  # others have waited long enough
                # A connection that idled may be gone: the first new one is dialled at once.
                await trio.sleep(RETRY_S * (attempts - 1))
        return self._broken(record), reason

    def _current_info(self, run: Run) -> RunInfo | None:
        """What this node says of a run now; None once it has ended."""
        return self._info_of(run.name) if self._runs.get(run.name) is run else None

    @contextlib.asynccontextmanager
    async def stream_to(
        self, peer: NodeId, addresses: tuple[Address, ...]
    ) -> AsyncIterator[tuple[Stream, FrameReader]]:
        """A bulk connection for one conversation; kept for the next unless this one broke it."""
        pooled = self._idle.pop(peer, None)
        if pooled is None:
            greeted = await self._connect(peer, addresses)
            pooled = greeted.stream, greeted.reader
        try:
            yield pooled
        except Refused:
            await self._keep(peer, pooled)
            raise
        except BaseException:
            await pooled[0].aclose()
            raise
        await self._keep(peer, pooled)

    async def _keep(self, peer: NodeId, pooled: tuple[Stream, FrameReader]) -> None:
        """One idle connection per peer; two runs at once may have opened two."""
        if peer in self._idle:
            await pooled[0].aclose()
            return
        self._idle[peer] = pooled
        if len(self._idle) > IDLE_LIMIT:
            await self._idle.pop(next(iter(self._idle)))[0].aclose()
