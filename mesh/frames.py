"""Frames over a stream: the async half of wire.py. Bodies go straight into the caller's buffers."""

from typing import Final

from mesh import wire
from mesh.core.messages import Message
from mesh.errors import RemoteProtocolError, StreamLost
from mesh.net.transport import Stream

STALL_S: Final = 10.0
"""An exchange without a byte for this long, on either side, is a lost connection."""

SEND_S: Final = 60.0
"""In which something of a frame has to be taken. The kernel reports a dead peer sooner where it can."""

USUAL_BYTES: Final = 4096
"""Buffer of a connection until a longer header comes."""


async def send_frame(
    stream: Stream, message: Message, body: memoryview | bytes = b"", *, before: bytes = b""
) -> int:
    """Sends one frame, behind a frame without body that was encoded `before`; returns the length."""
    header = before + wire.encode(message, len(body))
    if len(body):
        await stream.send_all(body, SEND_S, head=header)
    else:
        await stream.send_all(header, SEND_S)
    return len(header) + len(body)


class FrameReader:
    """Reads frames off one stream, from its first byte on: what one call to the stream brought may
    hold several. A frame's body must be read, or dropped, before the next.

    Timeouts count from byte to byte: a slow peer that goes on is waited for, however long it takes.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(USUAL_BYTES))
        self._start = self._end = 0
        self.received_bytes = 0

    @property
    def unread(self) -> int:
        """Bytes that came and are not read yet."""
        return self._end - self._start

    async def message(
        self, *, timeout_s: float, bodies: bool = False, worth: int = 1
    ) -> tuple[Message, int]:
        """The next message, and the length of the body behind it. `worth`: of both, where that is known.

        Raises PeerTimeout, StreamLost, or RemoteProtocolError (a body where `bodies` is false).
        """
        await self._have(wire.PREFIX_BYTES, timeout_s, worth)
        prefix = self._buffer[self._start : self._start + wire.PREFIX_BYTES]
        header_bytes, body_bytes = wire.parse_prefix(prefix)
        if body_bytes and not bodies:
            raise RemoteProtocolError("a body where none belongs")
        await self._have(wire.PREFIX_BYTES + header_bytes, timeout_s)
        begin = self._start + wire.PREFIX_BYTES
        self._start = begin + header_bytes
        self.received_bytes += wire.PREFIX_BYTES + header_bytes + body_bytes
        return wire.decode(self._buffer[begin : self._start]), body_bytes

    async def body(self, view: memoryview, *, timeout_s: float) -> None:
        """The body of the last message, exactly len(view) bytes."""
        count = min(len(view), self._end - self._start)
        view[:count] = self._buffer[self._start : self._start + count]
        self._start += count
        view = view[count:]
        while len(view):
            view = view[await self._receive(view, timeout_s, len(view)) :]

    async def drop_body(self, length: int, *, timeout_s: float) -> None:
        """Reads a body that nobody wants, to stay in step with the sender."""
        count = min(length, self._end - self._start)
        self._start += count
        while length > count:
            count += await self._receive(self._buffer[: length - count], timeout_s)

    async def _have(self, count: int, timeout_s: float, worth: int = 1) -> None:
        """Waits until `count` bytes that are not read yet lie in the buffer."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + count > len(self._buffer):
            left = bytes(self._buffer[self._start : self._end])
            if count > len(self._buffer):  # a page of a table, once in a while
                self._buffer = memoryview(bytearray(wire.PREFIX_BYTES + wire.HEADER_LIMIT_BYTES))
            self._buffer[: len(left)] = left
            self._start, self._end = 0, len(left)
        while self._end - self._start < count:
            self._end += await self._receive(self._buffer[self._end :], timeout_s, worth)

    async def _receive(self, view: memoryview, timeout_s: float, worth: int = 1) -> int:
        received = await self._stream.receive_into(view, timeout_s, worth=worth)
        if not received:
            raise StreamLost("connection closed by the other end")
        return received
