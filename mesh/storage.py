"""What a node keeps in its state directory, and the list of nodes that run on this machine.

Rules: 1. Every file is written whole: temporary file, fsync, rename, fsync of the directory; a kill
or a full disk at any point leaves the last good one. 2. Files are 0600 in a 0700 directory. 3. A
damaged file is never fatal where the mesh can tell again what was in it.

    node.pem ca.pem mesh.json token   identity.py
    incarnation                       first incarnation that was never used
    peers.json                        addresses of the last peers
    node.json control.sock lock       of the process that runs now
    node.log                          what it said, where `mesh run` or a training started it
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from mesh.core.address import Address
from mesh.core.membership import INCARNATION_BLOCK, INCARNATION_LIMIT
from mesh.core.messages import (
    NodeId,
)
from mesh.errors import MeshError, UsageError
from mesh.settings import host_directory, parse_address

PEERS_KEPT = 64

CLOCK_ORIGIN_S = 1_577_836_800
"""2020-01-01 in Unix seconds: incarnations that begin with the clock stay small until 2050."""

OWN_FILES = {"node.pem", "mesh.json", "lock", "incarnation"}
"""By these a state directory of ours is known."""


def private_directory(path: Path) -> Path:
    """Makes sure that the directory exists and that it is ours alone. Raises MeshError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise MeshError(
            f"cannot use {path}: {error.strerror}; choose another with --state"
        ) from None
    if status.st_uid != os.getuid():
        raise MeshError(f"{path} belongs to another user; choose another with --state")
    if status.st_mode & 0o077:
        held = {entry.name for entry in path.iterdir()}
        if held and not held & OWN_FILES:
            raise MeshError(
                f"{path} is open to other users and holds other things; "
                "choose a directory of its own with --state"
            )
        path.chmod(0o700)
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file, or leaves it as it was. Raises MeshError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MeshError(f"cannot write {path}: {error.strerror}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


class StateDirectory:
    """The files of one running node. lock() first; everything else only under it."""

    def __init__(self, path: Path) -> None:
        self.path = private_directory(path)
        self._lock: TextIO | None = None
        self._entry: Path | None = None

    def lock(self) -> None:
        """Claims the directory for this process until unlock(). Raises UsageError if it is taken."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MeshError(f"cannot write {self.path}: {error.strerror}") from None
        self._lock = open(descriptor, "w")  # noqa: SIM115 (held until unlock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise UsageError(
                f"a node runs with {self.path} already: `mesh status` shows it; "
                "a second node needs its own --state directory"
            ) from None

    def unlock(self) -> None:
        """Takes this process's traces away."""
        (self.path / "node.json").unlink(missing_ok=True)
        (self.path / "control.sock").unlink(missing_ok=True)
        if self._entry is not None:
            self._entry.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._entry.parent.rmdir()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def announce(self, node: NodeId, name: str, control: str) -> None:
        """Tells the shell and trainings of this machine where to ask this node."""
        self.write_running(node, name, control)
        try:
            self._entry = private_directory(host_directory()) / f"{node[:16]}.json"
            write_whole(self._entry, json.dumps({"state": str(self.path)}).encode())
        except MeshError:
            self._entry = None  # found by --state all the same

    def write_running(self, node: NodeId, name: str, control: str) -> None:
        """node.json: {"node", "name", "pid", "control"}."""
        about = {"node": node, "name": name, "pid": os.getpid(), "control": control}
        write_whole(self.path / "node.json", json.dumps(about).encode())

    def reserve_incarnations(self) -> int:
        """The first incarnation of a block that no process used before."""
        try:
            first = int((self.path / "incarnation").read_text())
        except (OSError, ValueError):
            first = 0
        if not 0 < first < INCARNATION_LIMIT // 2:
            # New, or the file is gone while the node's key is kept: the clock is above what this
            # node used before, unless it is wrong; then the mesh's rumours of it raise it.
            first = max(1, int(time.time()) - CLOCK_ORIGIN_S)
        self.store_incarnation(first + INCARNATION_BLOCK)
        return first

    def store_incarnation(self, unused: int) -> None:
        """Keeps that incarnations below `unused` are spent."""
        write_whole(self.path / "incarnation", str(unused).encode())

    def peers(self) -> list[Address]:
        """Addresses where peers were last time; empty if there is nothing readable."""
        found = _read_json(self.path / "peers.json")
        addresses = []
        for text in found[:PEERS_KEPT] if isinstance(found, list) else []:
            with contextlib.suppress(UsageError):
                addresses.append(parse_address(str(text)))
        return addresses

    def store_peers(self, addresses: list[Address]) -> None:
        write_whole(self.path / "peers.json", json.dumps([str(a) for a in addresses]).encode())
