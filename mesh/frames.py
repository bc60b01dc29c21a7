"""Frames over a stream: the async half of wire.py. Bodies go straight into the caller's buffers."""

from typing import Final

import trio

from mesh import wire
from mesh.core.messages import Message
from mesh.errors import PeerTimeout, RemoteProtocolError, StreamLost
from mesh.net.transport import Stream

JOIN_BYTES: Final = 128 * 1024
"""Bodies up to this travel behind their header in one call: the copy costs 10 us, a second call and
the other end's second wake-up cost more."""

STALL_S: Final = 10.0
"""An exchange without a byte for this long, on either side, is a lost connection."""

SEND_S: Final = 60.0
"""For one frame: 1 MiB at 20 kB/s. The kernel reports a dead peer sooner where it can."""


async def send_frame(
    stream: Stream, message: Message, body: memoryview | bytes = b"", *, before: bytes = b""
) -> int:
    """Sends one frame, behind a frame without body that was encoded `before`; returns the length."""
    header = before + wire.encode(message, len(body))
    with trio.move_on_after(SEND_S):
        if len(body) <= JOIN_BYTES:
            await stream.send_all(header + bytes(body))
        else:
            await stream.send_all(header)
            await stream.send_all(body)
        return len(header) + len(body)
    raise PeerTimeout(f"a frame of {len(body)} bytes was not taken within {SEND_S:g} s")


async def receive_exactly(stream: Stream, view: memoryview, timeout_s: float) -> None:
    """Fills `view`. Raises StreamLost if the stream ends before, PeerTimeout if nothing comes for
    timeout_s: a slow peer that goes on is waited for, however long a fragment takes it."""
    with trio.move_on_after(timeout_s) as patience:
        await _fill(stream, view, patience, timeout_s)
        return
    raise PeerTimeout(f"nothing came for {timeout_s:g} s")


async def _fill(
    stream: Stream, view: memoryview, patience: trio.CancelScope, timeout_s: float
) -> None:
    while len(view):
        received = await stream.receive_into(view)
        if not received:
            raise StreamLost("connection closed by the other end")
        view = view[received:]
        patience.deadline = trio.current_time() + timeout_s


class FrameReader:
    """Reads frames off one stream. A frame's body must be read, or dropped, before the next."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(wire.HEADER_LIMIT_BYTES))
        self.received_bytes = 0

    async def message(self, *, timeout_s: float, bodies: bool = False) -> tuple[Message, int]:
        """The next message, and the length of the body behind it.

        Raises PeerTimeout, StreamLost, or RemoteProtocolError (a body where `bodies` is false).
        """
        prefix = self._buffer[: wire.PREFIX_BYTES]
        with trio.move_on_after(timeout_s) as patience:  # one for both halves: scopes cost 20 us
            await _fill(self._stream, prefix, patience, timeout_s)
            header_bytes, body_bytes = wire.parse_prefix(prefix)
            if body_bytes and not bodies:
                raise RemoteProtocolError("a body where none belongs")
            header = self._buffer[:header_bytes]
            await _fill(self._stream, header, patience, timeout_s)
        if patience.cancelled_caught:
            raise PeerTimeout(f"nothing came for {timeout_s:g} s")
        self.received_bytes += wire.PREFIX_BYTES + header_bytes + body_bytes
        return wire.decode(header), body_bytes

    async def body(self, view: memoryview, *, timeout_s: float) -> None:
        """The body of the last message, exactly len(view) bytes."""
        await receive_exactly(self._stream, view, timeout_s)

    async def drop_body(self, length: int, *, timeout_s: float) -> None:
        """Reads a body that nobody wants, to stay in step with the sender."""
        while length:
            piece = self._buffer[: min(length, len(self._buffer))]
            await self.body(piece, timeout_s=timeout_s)
            length -= len(piece)
