"""Bytes over one non-blocking TCP socket: the waiting that every stream of this transport shares.

Rules: 1. The socket is tried first and waited for only where it has to be. 2. A stream that never
has to wait lets other tasks run every YIELD_S.
"""

import contextlib
import errno
import math
import socket
import ssl
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Final

import trio

from mesh.core.messages import NodeId
from mesh.errors import PeerTimeout, StreamLost

YIELD_S: Final = 0.001
"""Without it the loop stalls for as long as a fast peer sends: 12 ms and more. A turn of the loop takes 20 us,
a fragment and its answer 1 ms here, ten times that on a small machine."""

WAKE_BYTES: Final = 1 << 18
"""What a reader is woken for at most, that knows of more to come: at the first segment it would find 64 KiB, and
wait again. Waking a process takes its waker 50 us and more, and that is the end that has more to do."""

JOIN_BYTES: Final = 128 * 1024
"""Data up to this travel behind their head in one call: the copy costs 10 us, a second call and the
other end's second wake-up cost more."""

WOULD_BLOCK: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class SocketStream:
    """The bytes as they are. Owns the socket. See mesh.net.transport.Stream, which the two streams
    that go over the network, TlsStream and SealedStream, make of it."""

    at_once_bytes = 0

    def __init__(self, connection: socket.socket, peer: NodeId, host: str) -> None:
        self._socket = connection
        self._yielded_s = 0.0
        self._wakes_at = 1
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
            if perf_counter() - self._yielded_s > YIELD_S:
                await self._breathe()

    async def receive_into(
        self, view: memoryview, timeout_s: float = math.inf, *, worth: int = 1
    ) -> int:
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
                self._wake_at(min(worth, WAKE_BYTES))
                in_time = await self._wait(trio.lowlevel.wait_readable, timeout_s)
                continue
            except (OSError, ValueError) as error:
                raise StreamLost(f"connection lost: {text_of(error)}") from None
            if perf_counter() - self._yielded_s > YIELD_S:
                await self._breathe()
            return received

    async def aclose(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def _wake_at(self, count: int) -> None:
        """On Linux, which knows better where a socket cannot hold as many; others might wait for ever."""
        if count != self._wakes_at and sys.platform == "linux":
            with contextlib.suppress(OSError):  # gone: what comes next says so
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wakes_at = count

    async def _wait(self, ready: Callable[[socket.socket], object], timeout_s: float) -> bool:
        """False if it was not ready in time."""
        try:
            with trio.move_on_after(timeout_s):
                await ready(self._socket)  # type: ignore[misc]
                self._yielded_s = perf_counter()
                return True
            return False
        except (OSError, ValueError, trio.ClosedResourceError) as error:
            raise StreamLost(f"connection lost: {text_of(error)}") from None

    async def _breathe(self) -> None:
        await trio.lowlevel.checkpoint()
        self._yielded_s = perf_counter()


def text_of(error: BaseException) -> str:
    """An operating system's error in its own words, without Python's decoration."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS error"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error.errno)).lower()
    return type(error).__name__ if not str(error) else str(error)
