"""The initiator's half of an exchange, over one connection: the hot path.

core/exchange.py counts, replica.py computes. A fragment's trip: _send: w[k] sealed, or copied, and
sent -> the responder answers (responder.py) -> _receive: the delta read into a buffer -> w[k] moves.
Rules: 1. Fragments go out while deltas come back. 2. Between checking an index and applying its
numbers nothing waits. 3. No body is read before its length is what our own model says. 4. A fragment and
its delta take a limited time, however the bytes drip: a run has one exchange of its own at a time.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import trio

from mesh import wire
from mesh.core.exchange import Initiation, moved, share
from mesh.core.guard import too_long
from mesh.core.messages import (
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    FinishExchange,
    Fragment,
    OpenExchange,
    Refusal,
    RunInfo,
)
from mesh.errors import MeshError, RemoteProtocolError, StreamLost
from mesh.frames import SEND_S, STALL_S, FrameReader, send_frame
from mesh.net.transport import Stream
from mesh.runs import Run

FRAGMENT_S: Final = 300.0
"""For a fragment to go out, and for a delta to come in: 1 MiB at 3.5 kB/s, half of what TCP moves where 30 %
of all packets are lost. STALL_S counts from byte to byte, so a byte every nine seconds would hold the run for
ever."""


@contextlib.contextmanager
def _in_time() -> Iterator[trio.CancelScope]:
    with trio.move_on_after(FRAGMENT_S) as scope:
        yield scope
    if scope.cancelled_caught:
        raise StreamLost(f"a fragment took more than {FRAGMENT_S:g} s")


class Refused(MeshError):
    """The responder said no; the connection is still good."""

    def __init__(self, message: ExchangeRefused) -> None:
        super().__init__(message.reason)
        self.unknown = message.unknown
        self.position = message.position


class Conversation:
    """One exchange, from where it stands, over one connection that nobody else uses meanwhile."""

    def __init__(self, run: Run, record: Initiation, stream: Stream, reader: FrameReader) -> None:
        self._run = run
        self._record = record
        self._stream = stream
        self._reader = reader
        self._room = trio.Event()
        self._stopped = False
        self._codec = run.codecs[record.codec]
        self._opening = b""
        """goes out with the first fragment: the responder wakes once for both"""

    async def hold(self, info: RunInfo) -> None:
        """Until both sides have every delta. Raises Refused, NotFinite, RemoteProtocolError or
        StreamLost; the record says how far it came."""
        record, received, weight = self._record, self._reader.received_bytes, None
        try:
            self._opening = wire.encode(
                OpenExchange(
                    exchange=record.exchange,
                    run=info.run,
                    schema=info.schema,
                    weight=self._run.spec.weight,
                    start=record.applied,
                    pull=record.pull,
                    started=info.started,
                    exchanged=info.exchanged,
                    progress=info.progress,
                    codec=record.codec,
                    strategy=info.strategy,
                    first=record.first,
                    end=record.end,
                    reach=record.reach,
                    turn=record.turn,
                    clock=record.clock,
                )
            )
            if record.turn is not None and record.sent_once == record.first:
                # An exact round is asked for again and again until its time has come.
                with _in_time():
                    await self._send_opening()
                    weight = await self._answer(memoryview(b""), None)
            if record.end - record.first == 1:
                # Small models: one packet each way, no second task.
                with _in_time():
                    await self._send()
                await self._receive(weight)
            else:
                await self._both_ways(weight)
            with _in_time():
                await self._say(FinishExchange(exchange=record.exchange))
        finally:
            self._run.counters.bytes_received += self._reader.received_bytes - received

    async def _say(
        self, message: Fragment | FinishExchange, body: memoryview | bytes = b""
    ) -> None:
        before, self._opening = self._opening, b""
        sent = await send_frame(self._stream, message, body, before=before)
        self._run.counters.bytes_sent += sent

    async def _send_opening(self) -> None:
        opening, self._opening = self._opening, b""
        await self._stream.send_all(opening, SEND_S)
        self._run.counters.bytes_sent += len(opening)

    async def _both_ways(self, weight: float | None) -> None:
        failure: MeshError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_until_lost)
            try:
                await self._receive(weight)
            except MeshError as error:
                failure = error
            self._stopped = True
            self._room.set()
            if not isinstance(failure, Refused):
                # After a refusal the frame in hand is finished: the connection stays in step.
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_until_lost(self) -> None:
        try:
            await self._send()
        except StreamLost:
            await self._stream.aclose()  # which _receive() then reports

    async def _send(self) -> None:
        run, record = self._run, self._record
        buffer = run.buffers.take()
        try:
            while record.sent < record.end and not self._stopped:
                index = record.next_to_send()
                if index is None:
                    self._room = trio.Event()
                    await self._room.wait()
                    continue
                body = memoryview(b"") if record.pull else self._body(index, buffer)
                record.fragment_sent()
                await self._say(
                    Fragment(exchange=record.exchange, index=index, received=record.applied), body
                )
        finally:
            run.buffers.give(buffer)

    def _body(self, index: int, buffer: memoryview) -> memoryview:
        """A fragment as it travels. Nothing may wait before it goes to the stream."""
        replica = self._run.replica
        body = replica.as_it_lies(index, self._codec)
        if body is None or len(body) > self._stream.at_once_bytes:
            body = buffer[: replica.body_bytes(index, self._codec)]
            replica.write(index, body, self._codec)
        return body

    async def _receive(self, weight: float | None) -> None:
        """All deltas. `weight`: the responder's, where it has said yes already."""
        buffer = self._run.buffers.take()
        try:
            with _in_time() as scope:
                while not self._record.done:
                    weight = await self._answer(buffer, weight)
                    scope.deadline = trio.current_time() + FRAGMENT_S
        finally:
            self._run.buffers.give(buffer)

    async def _answer(self, buffer: memoryview, weight: float | None) -> float | None:
        """Takes one message. `weight`: the responder's, once it has said yes; returned likewise."""
        run, record = self._run, self._record
        # Who said yes says nothing but deltas.
        worth = 1 if weight is None else run.replica.body_bytes(record.applied, self._codec)
        message, length = await self._reader.message(timeout_s=STALL_S, bodies=True, worth=worth)
        if getattr(message, "exchange", record.exchange) != record.exchange:
            raise RemoteProtocolError("an answer to another exchange")
        match message:
            case ExchangeOpened() if not length and weight is None:
                weight = message.weight
                if not record.pull and weight + run.spec.weight <= 0:
                    raise RemoteProtocolError("two replicas of weight 0")
                run.clock_answered(record, message.clock, weight)
            case Delta() if weight is not None and message.index < record.end:
                if record.pull and run.ended:
                    raise StreamLost("the run ended here")
                if length != run.replica.body_bytes(message.index, self._codec):
                    raise RemoteProtocolError(f"a delta of {length} bytes")
                await self._reader.body(buffer[:length], timeout_s=STALL_S)
                self._apply(message, buffer[:length], weight)
            case ExchangeRefused() if not length:
                raise Refused(message)
            case Refusal() if not length:
                raise StreamLost(f"refused: {message.reason}")
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} as an answer")
        return weight

    def _apply(self, message: Delta, body: memoryview, weight: float) -> None:
        record, replica = self._record, self._run.replica
        record.delta_arrived(message.index)
        if record.pull:
            replica.take(message.index, body, self._run.taken, self._codec)
            record.delta_applied()
        else:
            mine = self._run.spec.weight
            step = share(weight, mine, part=message.part, turn=record.turn)
            record.square_distance += replica.apply(
                message.index, body, step, self._codec, self._check_length
            )
            record.delta_applied()
            moved(self._run.initiated, message.index, step)
        self._room.set()

    def _check_length(self, square: float) -> None:
        if too_long(self._record.reach, self._record.square_distance + square):
            raise RemoteProtocolError("deltas longer than this node's reach")
