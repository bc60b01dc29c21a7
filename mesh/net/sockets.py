"""Bytes over one non-blocking TCP socket: the waiting that every stream of this transport shares.

Rules: 1. The socket is tried first and waited for only where it has to be. 2. A stream that never
has to wait lets other tasks run after each YIELD_BYTES.
"""

import errno
import math
import socket
import ssl
from collections.abc import Callable
from typing import Final

import trio

from mesh.core.messages import NodeId
from mesh.errors import PeerTimeout, StreamLost

YIELD_BYTES: Final = 1 << 20
"""Half a millisecond of work; without it the loop stalls for as long as a fast peer sends."""

JOIN_BYTES: Final = 128 * 1024
"""Data up to this travel behind their head in one call: the copy costs 10 us, a second call and the
other end's second wake-up cost more."""

WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class SocketStream:
    """The bytes as they are. Owns the socket. See mesh.net.transport.Stream, which the two streams
    that go over the network, TlsStream and SealedStream, make of it."""

    def __init__(self, connection: socket.socket, peer: NodeId, host: str) -> None:
        self._socket = connection
        self._since_yield = 0
        self.peer = peer
        self.host = host

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = math.inf, *, head: bytes = b""
    ) -> None:
        if head and len(data) <= JOIN_BYTES:
            data = head + bytes(data)
        elif head:
            await self.send_all(head, timeout_s)
        view = memoryview(data).cast("B")
        while len(view):
            try:
                sent = self._socket.send(view)
            except WOULD_BLOCK as error:
                if isinstance(error, ssl.SSLWantReadError):
                    await trio.sleep(0.001)  # TLS wants to read first; the receiving task is at it
                elif not await self._wait(trio.lowlevel.wait_writable, timeout_s):
                    raise PeerTimeout(f"nothing was taken for {timeout_s:g} s") from None
                continue
            except (OSError, ValueError) as error:
                raise StreamLost(f"connection lost: {text_of(error)}") from None
            view = view[sent:]
            await self._breathe(sent)

    async def receive_into(self, view: memoryview, timeout_s: float = math.inf) -> int:
        in_time = True
        while True:
            try:
                received = self._socket.recv_into(view)
            except WOULD_BLOCK as error:
                if isinstance(error, ssl.SSLWantWriteError):
                    await trio.sleep(0.001)
                    continue
                if not in_time:  # and nothing came while this process was stopped, either
                    raise PeerTimeout(f"nothing came for {timeout_s:g} s") from None
                in_time = await self._wait(trio.lowlevel.wait_readable, timeout_s)
                continue
            except (OSError, ValueError) as error:
                raise StreamLost(f"connection lost: {text_of(error)}") from None
            await self._breathe(received)
            return received

    async def aclose(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def _wait(self, ready: Callable[[socket.socket], object], timeout_s: float) -> bool:
        """False if it was not ready in time."""
        self._since_yield = 0
        try:
            with trio.move_on_after(timeout_s):
                await ready(self._socket)  # type: ignore[misc]
                return True
            return False
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise StreamLost(f"connection lost: {text_of(error)}") from None

    async def _breathe(self, moved: int) -> None:
        self._since_yield += moved
        if self._since_yield >= YIELD_BYTES:
            self._since_yield = 0
            await trio.lowlevel.checkpoint()


def text_of(error: BaseException) -> str:
    """An operating system's error in its own words, without Python's decoration."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS error"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error.errno)).lower()
    return type(error).__name__ if not str(error) else str(error)
