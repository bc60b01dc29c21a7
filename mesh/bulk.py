"""Exchanges over bulk connections: the hot path. core/exchange.py counts, replica.py computes.

A fragment's trip: initiate() -> _send_fragments: w[k] copied into a buffer, sent -> the responder's
_answer_fragment: delta = x - w, w moves, reply sent -> _receive_deltas: w moves -> ExchangeEnded.
Rules: 1. Fragments go out while deltas come back. 2. Between checking an index and applying its
numbers nothing waits. 3. No body is read before its length is what our own model says. 4. A broken
connection is dialled again and the exchange resumed; what stays in doubt is kept for later.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from mesh.core import events as ev
from mesh.core.exchange import Initiation, share
from mesh.core.messages import (
    Address,
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    FinishExchange,
    Fragment,
    NodeId,
    OpenExchange,
    Refusal,
    RunInfo,
)
from mesh.core.schedule import Relation, relation
from mesh.errors import (
    MeshError,
    NotFinite,
    RemoteProtocolError,
    StreamLost,
)
from mesh.frames import FrameReader, send_frame
from mesh.net.transport import Stream
from mesh.runs import KeptReply, Run

STALL_S: Final = 10.0
"""An exchange without a byte for this long counts as a lost connection."""

IDLE_S: Final = 120.0
"""A bulk connection that carries nothing is closed by its responder after this."""

ATTEMPTS: Final = 3
"""Connections that may break in a row without one delta, before others get their turn."""

RETRY_S: Final = 0.2
CONNECTIONS_LIMIT: Final = 64
"""Bulk connections that a node answers at once; each holds one header buffer and one fragment."""


class Refused(MeshError):
    """The responder said no."""

    def __init__(self, message: ExchangeRefused) -> None:
        super().__init__(message.reason)
        self.unknown = message.unknown


Connect = Callable[[NodeId, tuple[Address, ...]], Awaitable[Stream]]


class Bulk:
    """All exchanges of one node, both sides."""

    def __init__(
        self,
        *,
        me: NodeId,
        connect: Connect,
        emit: Callable[[ev.Event], Awaitable[None]],
        info_of: Callable[[str], RunInfo | None],
        refused: Callable[[str], None],
    ) -> None:
        """`connect` opens a greeted bulk connection; `info_of` is what this node says of its runs;
        `refused` counts what peers did wrong."""
        self._me = me
        self._connect = connect
        self._emit = emit
        self._info_of = info_of
        self._refused = refused
        self._idle: dict[NodeId, tuple[Stream, FrameReader]] = {}
        self._answering = 0
        self.runs: dict[str, Run] = {}

    # ------------------------------------------------------------------------------ initiator

    async def initiate(self, start: ev.StartExchange) -> None:
        """Performs one StartExchange and reports its ExchangeEnded."""
        run = self.runs.get(start.run)
        if run is None:
            return
        began = trio.current_time()
        record = None if start.pull else run.unfinished.pop(start.peer, None)
        if record is None:
            record = Initiation(
                exchange=start.exchange,
                peer=start.peer,
                fragments=run.replica.fragments,
                pull=start.pull,
            )
        else:
            run.counters.resumed += 1
        run.current = record
        try:
            outcome, reason = await self._drive(run, record, start.addresses)
        finally:
            run.current = None
        self._count(run, record, outcome)
        if self.runs.get(start.run) is run:
            await self._emit(
                ev.ExchangeEnded(
                    run=start.run,
                    peer=start.peer,
                    pull=start.pull,
                    outcome=outcome,
                    reason=reason,
                    duration_s=trio.current_time() - began,
                    square_distance=record.square_distance,
                    square_norm=run.replica.square_norm(),
                )
            )

    def _count(self, run: Run, record: Initiation, outcome: ev.Outcome) -> None:
        match outcome:
            case ev.Outcome.COMPLETED:
                run.counters.completed += 1
                run.counters.pulled += record.pull
                run.exchanged_at, run.last_peer = trio.current_time(), record.peer
                if not record.pull:
                    run.distances.append(record.square_distance)
            case ev.Outcome.REFUSED:
                run.counters.refused += 1
            case ev.Outcome.INTERRUPTED:
                run.unfinished[record.peer] = record
                run.counters.failed += 1
            case ev.Outcome.ABANDONED:
                run.counters.failed += 1

    async def _drive(
        self, run: Run, record: Initiation, addresses: tuple[Address, ...]
    ) -> tuple[ev.Outcome, str]:
        """Connections, one after the other, until the exchange is over."""
        reason, attempts = "", 0
        while attempts < ATTEMPTS:
            applied = record.applied
            try:
                async with self._stream_to(record.peer, addresses) as (stream, reader):
                    sent, received = 0, reader.received_bytes
                    try:
                        sent = await self._converse(run, record, stream, reader)
                    finally:
                        run.counters.bytes_sent += sent
                        run.counters.bytes_received += reader.received_bytes - received
                return ev.Outcome.COMPLETED, ""
            except Refused as refusal:
                outcome = ev.Outcome.ABANDONED if refusal.unknown else ev.Outcome.REFUSED
                return outcome, str(refusal)
            except NotFinite as error:
                run.counters.non_finite += 1
                return ev.Outcome.ABANDONED, str(error)
            except RemoteProtocolError as error:
                self._refused("protocol")
                return ev.Outcome.ABANDONED, str(error)
            except StreamLost as error:
                reason = str(error)
                record.connection_lost()
                if record.sent_once:
                    run.counters.resumed += 1
                attempts = 1 if record.applied > applied else attempts + 1
                # A connection that idled in the pool may be gone: the first new one is at once.
                await trio.sleep(RETRY_S * (attempts - 1))
        return (ev.Outcome.INTERRUPTED if record.in_doubt else ev.Outcome.ABANDONED), reason

    @contextlib.asynccontextmanager
    async def _stream_to(
        self, peer: NodeId, addresses: tuple[Address, ...]
    ) -> AsyncIterator[tuple[Stream, FrameReader]]:
        """A bulk connection for one conversation; kept for the next unless this one broke it."""
        pooled = self._idle.pop(peer, None)
        if pooled is None:
            stream = await self._connect(peer, addresses)
            pooled = stream, FrameReader(stream)
        stream = pooled[0]
        try:
            yield pooled
        except Refused:
            await self._keep(peer, pooled)
            raise
        except BaseException:
            await stream.aclose()
            raise
        await self._keep(peer, pooled)

    async def _keep(self, peer: NodeId, pooled: tuple[Stream, FrameReader]) -> None:
        """One idle connection per peer; two runs at once may have opened two."""
        if peer in self._idle:
            await pooled[0].aclose()
        else:
            self._idle[peer] = pooled

    async def _converse(
        self, run: Run, record: Initiation, stream: Stream, reader: FrameReader
    ) -> int:
        """One exchange, from where it stands, over one connection. Returns bytes sent."""
        info = self._info_of(run.name)
        if info is None:
            raise Refused(
                ExchangeRefused(exchange=record.exchange, reason="the run ended", unknown=True)
            )
        opening = OpenExchange(
            exchange=record.exchange,
            run=run.name,
            schema=info.schema,
            weight=run.spec.weight,
            start=record.applied,
            pull=record.pull,
            started=info.started,
            exchanged=info.exchanged,
        )
        sender = _Sender(run, record, stream, reader)
        sender.sent_bytes += await send_frame(stream, opening)
        if record.fragments == 1:
            # Small models: request and answer, one packet each way, no second task.
            await sender.send_fragments()
            await self._receive_deltas(run, record, reader, sender)
        else:
            await self._both_ways(run, record, reader, sender)
        sender.sent_bytes += await send_frame(stream, FinishExchange(exchange=record.exchange))
        return sender.sent_bytes

    async def _both_ways(
        self, run: Run, record: Initiation, reader: FrameReader, sender: "_Sender"
    ) -> None:
        failure: MeshError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send_until_lost)
            try:
                await self._receive_deltas(run, record, reader, sender)
            except MeshError as error:
                failure = error
            sender.stop()
            if not isinstance(failure, Refused):
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _receive_deltas(
        self, run: Run, record: Initiation, reader: FrameReader, sender: "_Sender"
    ) -> None:
        weight: float | None = None
        buffer = run.buffers.take()
        try:
            while not record.done:
                message, length = await reader.message(timeout_s=STALL_S, bodies=True)
                if getattr(message, "exchange", record.exchange) != record.exchange:
                    raise RemoteProtocolError("an answer to another exchange")
                match message:
                    case ExchangeOpened() if not length and weight is None:
                        weight = message.weight
                        if not record.pull and weight + run.spec.weight <= 0:
                            raise RemoteProtocolError("two replicas of weight 0")
                    case ExchangeRefused() if not length:
                        raise Refused(message)
                    case Refusal() if not length:
                        raise StreamLost(f"refused: {message.reason}")
                    case Delta() if weight is not None and message.index < record.fragments:
                        if length != run.replica.body_bytes(message.index):
                            raise RemoteProtocolError(f"delta of {length} bytes")
                        body = buffer[:length]
                        await reader.body(body, timeout_s=STALL_S)
                        record.delta_arrived(message.index)
                        if record.pull:
                            distance = run.replica.take(message.index, body)
                        else:
                            step = share(weight, run.spec.weight, halved=message.halved)
                            distance = run.replica.apply(message.index, body, step)
                        record.square_distance += distance
                        sender.room()
                    case _:
                        raise RemoteProtocolError(f"{type(message).__name__} as an answer")
        finally:
            run.buffers.give(buffer)

    # ------------------------------------------------------------------------------ responder

    async def answer(self, stream: Stream) -> None:
        """Answers one peer's exchanges until its connection ends."""
        if self._answering >= CONNECTIONS_LIMIT:
            await send_frame(stream, Refusal(reason="too many bulk connections"))
            return
        self._answering += 1
        try:
            await self._answer(stream)
        finally:
            self._answering -= 1

    async def _answer(self, stream: Stream) -> None:
        reader = FrameReader(stream)
        opened: tuple[Run, OpenExchange] | None = None
        refused: int | None = None
        while True:
            message, length = await reader.message(timeout_s=IDLE_S, bodies=True)
            match message:
                case OpenExchange() if not length:
                    run, reply = self._open(stream.peer, message)
                    opened = (run, message) if run else None
                    refused = None if run else message.exchange
                    if run and message.pull:
                        await self._emit(ev.WeightsServed(run=run.name))
                    await send_frame(stream, reply)
                case Fragment() if message.exchange == refused:
                    # Sent before our refusal arrived.
                    await reader.drop_body(length, timeout_s=STALL_S)
                case Fragment() if opened and message.exchange == opened[1].exchange:
                    if self.runs.get(opened[0].name) is not opened[0]:
                        raise StreamLost("the run ended here")
                    await self._answer_fragment(stream, reader, *opened, message, length)
                case FinishExchange() if opened and message.exchange == opened[1].exchange:
                    if not opened[1].pull:
                        opened[0].responses.finish(stream.peer, message.exchange)
                        opened[0].counters.answered += 1
                    opened = None
                case FinishExchange() if not length:
                    pass
                case Refusal():
                    return
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} out of turn")

    def _open(
        self, peer: NodeId, message: OpenExchange
    ) -> tuple[Run | None, ExchangeOpened | ExchangeRefused]:
        reason = self._objection(peer, message)
        if reason is None:
            run = self.runs[message.run]
            return run, ExchangeOpened(exchange=message.exchange, weight=run.spec.weight)
        unknown = message.start > 0
        return None, ExchangeRefused(exchange=message.exchange, reason=reason, unknown=unknown)

    def _objection(self, peer: NodeId, message: OpenExchange) -> str | None:
        run, info = self.runs.get(message.run), self._info_of(message.run)
        if run is None or info is None:
            return "this run is not trained here"
        if message.schema != info.schema:
            self._refused("schema")
            return "schema differs"
        if not info.started:
            return "no weights here yet"
        if message.pull:
            return "taking weights itself" if run.current and run.current.pull else None
        if message.weight + run.spec.weight <= 0:
            return "two replicas of weight 0"
        theirs = RunInfo(
            run=message.run,
            schema=message.schema,
            started=message.started,
            exchanged=message.exchanged,
        )
        if relation(info, self._me, theirs, peer) is not Relation.AVERAGE:
            return "one of the two takes the other's weights first"
        return run.responses.open(peer, message.exchange, message.start)

    async def _answer_fragment(
        self,
        stream: Stream,
        reader: FrameReader,
        run: Run,
        opening: OpenExchange,
        message: Fragment,
        length: int,
    ) -> None:
        index = message.index
        if index >= run.replica.fragments:
            raise RemoteProtocolError(f"fragment {index} of {run.replica.fragments}")
        expected = 0 if opening.pull else run.replica.body_bytes(index)
        if length != expected:
            raise RemoteProtocolError(f"fragment of {length} bytes where {expected} belong")
        before = reader.received_bytes
        halved = False
        scratch = run.buffers.take()
        try:
            if opening.pull:
                reply = scratch[: run.replica.body_bytes(index)]
                run.replica.write(index, reply)
            else:
                await reader.body(scratch[:length], timeout_s=STALL_S)
                kept, halved = self._apply(stream.peer, run, opening, message, scratch[:length])
                reply = kept[:length]
            sent = await send_frame(
                stream, Delta(exchange=opening.exchange, index=index, halved=halved), reply
            )
        finally:
            run.buffers.give(scratch)
        run.counters.bytes_sent += sent
        run.counters.bytes_received += reader.received_bytes - before + length

    def _apply(
        self, peer: NodeId, run: Run, opening: OpenExchange, message: Fragment, body: memoryview
    ) -> tuple[memoryview, bool]:
        """Applies a fragment once, or finds what was answered before. Nothing waits in here."""
        if self.runs.get(run.name) is not run:
            raise StreamLost("the run ended here")
        kept = run.responses.kept(peer, opening.exchange, message.index, message.received)
        if kept is not None:
            return kept.buffer, kept.halved
        halved = run.crosses(message.index)
        step = share(opening.weight, run.spec.weight, halved=halved)
        reply = run.buffers.take()
        try:
            run.replica.answer(message.index, body, step, reply[: len(body)])
        except NotFinite:
            run.buffers.give(reply)
            run.counters.non_finite += 1
            raise
        run.responses.applied(peer, opening.exchange, message.index, KeptReply(reply, halved))
        return reply, halved

    async def close(self) -> None:
        """Ends the idle connections."""
        for stream, _ in self._idle.values():
            await stream.aclose()
        self._idle.clear()


class _Sender:
    """The sending half of one conversation."""

    def __init__(self, run: Run, record: Initiation, stream: Stream, reader: FrameReader) -> None:
        self._run = run
        self._record = record
        self._stream = stream
        self._room = trio.Event()
        self._stopped = False
        self.sent_bytes = 0

    def room(self) -> None:
        """A delta arrived: the window moved."""
        self._room.set()

    def stop(self) -> None:
        """The exchange is over or refused: finish the frame in hand, then send no more."""
        self._stopped = True
        self._room.set()

    async def send_until_lost(self) -> None:
        """send_fragments(); a lost connection is closed, which the receiving half then reports."""
        try:
            await self.send_fragments()
        except StreamLost:
            await self._stream.aclose()

    async def send_fragments(self) -> None:
        run, record = self._run, self._record
        buffer = run.buffers.take()
        try:
            while record.sent < record.fragments and not self._stopped:
                index = record.next_to_send()
                if index is None:
                    self._room = trio.Event()
                    await self._room.wait()
                    continue
                body = memoryview(b"") if record.pull else buffer[: run.replica.body_bytes(index)]
                if not record.pull:
                    run.replica.write(index, body)
                record.fragment_sent()
                message = Fragment(exchange=record.exchange, index=index, received=record.applied)
                self.sent_bytes += await send_frame(self._stream, message, body)
        finally:
            run.buffers.give(buffer)
