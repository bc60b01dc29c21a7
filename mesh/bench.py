"""Measures the way to another node: over the connection, and the encryption, that weights travel by.

Rules: 1. Bounded in bytes and in time, on both ends: a node answers one bench at a time, and no more
than ANSWER_LIMIT_BYTES of it. 2. Nothing is kept: blocks go into one buffer and are forgotten. 3.
Only one direction carries blocks at a time, so that each is measured alone.
A block's trip: measure() -> BenchBlock + body -> answer() drops it -> BenchEcho + body of the wanted
length -> measure() drops it.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio
import trio.lowlevel

from mesh import wire
from mesh.core.for_people import BenchBlock, BenchEcho
from mesh.core.messages import Message, Refusal
from mesh.errors import MeshError, RemoteProtocolError, first_of
from mesh.frames import STALL_S, FrameReader, send_frame
from mesh.net.transport import Stream

BLOCK_BYTES: Final = wire.BODY_LIMIT_BYTES
IN_FLIGHT: Final = 8
"""Blocks on their way at once: what an exchange may have in doubt."""

ROUND_TRIPS: Final = 50
ROUND_TRIPS_SHARE: Final = 0.2
"""Of the time that a bench may take."""

SLACK_S: Final = 5.0
"""Beyond its time: to connect, and for the blocks that are on their way when it is over."""

BYTES_LIMIT: Final = 1024 * 1024 * 1024
SECONDS_LIMIT: Final = 60.0
ANSWER_LIMIT_BYTES: Final = 2 * BYTES_LIMIT
"""What one connection may make the other end receive and send."""

Progress = Callable[[str, float], Awaitable[None]]
"""Hears which part is under way, and how much of it is done, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Times in seconds, rates in bytes a second; a rate is None where nothing got through."""

    times_s: tuple[float, ...]
    sent_bytes: int
    sent_s: float
    received_bytes: int
    received_s: float


class _Budget:
    """Time and bytes that are left for one direction."""

    def __init__(self, total_bytes: int, seconds: float) -> None:
        self.total = max(1, -(-total_bytes // BLOCK_BYTES))
        self.asked = self.done = 0
        self._until = trio.current_time() + seconds

    def more(self) -> bool:
        return self.asked < self.total and trio.current_time() < self._until


async def measure(
    stream: Stream, reader: FrameReader, *, total_bytes: int, seconds: float, progress: Progress
) -> BenchResult:
    """Round trips, then `total_bytes` to the other end, then as many back; at most so long in all.

    Raises StreamLost, RemoteProtocolError, MeshError if the other end refuses.
    """
    times = await _round_trips(stream, reader, seconds * ROUND_TRIPS_SHARE, progress)
    half_s = seconds * (1 - ROUND_TRIPS_SHARE) / 2
    ways: list[tuple[int, float]] = []
    for out in (True, False):
        budget = _Budget(total_bytes, half_s)
        try:
            ways.append(await _blocks(stream, reader, budget, out=out, progress=progress))
        except* MeshError as group:
            raise first_of(group) from None
    (sent, sent_s), (received, received_s) = ways
    return BenchResult(
        times_s=tuple(times),
        sent_bytes=sent,
        sent_s=sent_s,
        received_bytes=received,
        received_s=received_s,
    )


async def _round_trips(
    stream: Stream, reader: FrameReader, seconds: float, progress: Progress
) -> list[float]:
    times: list[float] = []
    until = trio.current_time() + seconds
    while len(times) < ROUND_TRIPS and trio.current_time() < until:
        began = time.perf_counter()
        await send_frame(stream, BenchBlock(sequence=len(times), want=0))
        await _echo(reader, len(times), 0)
        times.append(time.perf_counter() - began)
        await progress("round trips", len(times) / ROUND_TRIPS)
    return times


async def _blocks(
    stream: Stream, reader: FrameReader, budget: _Budget, *, out: bool, progress: Progress
) -> tuple[int, float]:
    """(bytes that got through, seconds) one way."""
    body = memoryview(bytearray(BLOCK_BYTES if out else 0))
    want = 0 if out else BLOCK_BYTES
    room = trio.Semaphore(IN_FLIGHT)
    asked_all = trio.Event()

    async def ask() -> None:
        while budget.more():
            await room.acquire()
            budget.asked += 1
            await send_frame(stream, BenchBlock(sequence=budget.asked - 1, want=want), body)
        asked_all.set()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        while budget.done < budget.asked or not asked_all.is_set():
            if budget.done == budget.asked:
                await trio.lowlevel.checkpoint()  # the first is on its way out
                continue
            await _echo(reader, budget.done, want)
            budget.done += 1
            room.release()
            await progress("sending" if out else "receiving", budget.done / budget.total)
    return budget.done * BLOCK_BYTES, time.perf_counter() - began


async def _echo(reader: FrameReader, sequence: int, length: int) -> None:
    message, body_bytes = await reader.message(timeout_s=STALL_S, bodies=True)
    if isinstance(message, Refusal):
        raise MeshError(f"it refused: {message.reason}")
    if message != BenchEcho(sequence=sequence) or body_bytes != length:
        raise RemoteProtocolError(f"{type(message).__name__} in a bench")
    await reader.drop_body(body_bytes, timeout_s=STALL_S)


class BenchAnswerer:
    """The other end: one bench at a time."""

    def __init__(self) -> None:
        self._busy = False

    async def answer(
        self, stream: Stream, reader: FrameReader, first: BenchBlock, length: int
    ) -> None:
        """Answers blocks until the connection ends or its bytes are used up."""
        if self._busy:
            await reader.drop_body(length, timeout_s=STALL_S)
            await send_frame(stream, Refusal(reason="another bench is under way here"))
            return
        self._busy = True
        try:
            await self._answer(stream, reader, first, length)
        finally:
            self._busy = False

    async def _answer(
        self, stream: Stream, reader: FrameReader, first: BenchBlock, length: int
    ) -> None:
        body = memoryview(bytearray(BLOCK_BYTES))
        message: Message = first
        moved = 0
        while isinstance(message, BenchBlock):
            moved += length + message.want
            if moved > ANSWER_LIMIT_BYTES:
                raise RemoteProtocolError("a bench without end")
            await reader.drop_body(length, timeout_s=STALL_S)
            await send_frame(stream, BenchEcho(sequence=message.sequence), body[: message.want])
            message, length = await reader.message(timeout_s=STALL_S, bodies=True)
        if not isinstance(message, Refusal):
            raise RemoteProtocolError(f"{type(message).__name__} in a bench")


async def finish(stream: Stream) -> None:
    """Ends a bench politely."""
    with contextlib.suppress(MeshError), trio.move_on_after(1.0):
        await send_frame(stream, Refusal(reason="done"))
    with trio.CancelScope(shield=True):
        await stream.aclose()
