"""A local connection of the node: JSON objects, one a line, and who is at the other end."""

import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from mesh.arguments import Request
from mesh.turn import Turn

LINE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""The schema of 65,536 tensors is about 8 MB."""


class Lines(Protocol):
    """A training's connection as the node has it; in a laboratory there is no socket under it."""

    def gone(self) -> bool:
        """Whether the process that connected has ended, and another holds its end: a forked worker."""

    async def receive(self) -> Request | None: ...

    async def send(self, answer: dict[str, Any], descriptor: int | None = None) -> None: ...


class SocketLines:
    """JSON objects, one a line, over a local connection, which is tried first and waited for only where
    it has to be: trio's own sockets give the loop a turn for each word."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._sending = Turn()

    async def receive(self) -> Request | None:
        """The next object; None at the end, or after anything that is not one."""
        searched, waited = 0, False
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            try:
                data = self._connection.recv(65536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._connection)
                waited = True
                continue
            if not data or searched > LINE_LIMIT_BYTES:
                return None
            self._buffer += data
        if not waited:  # whoever talks without a pause lets others have their turn
            await trio.lowlevel.checkpoint()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return request if isinstance(request, dict) else None

    async def send(self, answer: dict[str, Any] | str, descriptor: int | None = None) -> None:
        """An object, or one that is written already."""
        text = answer if isinstance(answer, str) else json.dumps(answer, allow_nan=False)
        data = memoryview(text.encode() + b"\n")
        async with self._sending:
            while data:
                try:
                    if descriptor is None:
                        sent = self._connection.send(data)
                    else:
                        sent = socket.send_fds(self._connection, [data], [descriptor])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._connection)
                    continue
                data, descriptor = data[sent:], None

    def gone(self) -> bool:
        """See Lines."""
        pid, _ = _caller(self._connection)
        if not pid:  # of another container, or not known on this system
            return False
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except (OSError, IndexError):
            return False
        return state in "ZX"  # nobody has asked for its exit code yet


def is_own_user(connection: socket.socket) -> bool:
    """Whether a program of this user connected, or of root."""
    if sys.platform != "linux":
        return True  # the directory's 0700 is what protects it there
    _, user = _caller(connection)
    return user in (os.getuid(), 0)


def _caller(connection: socket.socket) -> tuple[int, int]:
    """(pid, user) of whoever connected; (0, -1) where the system does not say."""
    if sys.platform != "linux":
        return 0, -1
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, user, _ = struct.unpack("3i", credentials)
    return pid, user
