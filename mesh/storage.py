"""What a node keeps in its state directory, and the list of nodes that run on this machine.

Rules: 1. Every file is written whole (disk.py): a kill or a full disk at any point leaves the last
good one. 2. Files are 0600 in a 0700 directory. 3. A damaged file is never fatal where the mesh can
tell again what was in it.

    node.pem ca.pem mesh.json token   identity.py
    incarnation peers.json            memory.py
    node.json control.sock lock       of the process that runs now
    node.log                          what it said, where `mesh run` or a training started it
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from mesh.core.messages import (
    NodeId,
)
from mesh.disk import write_whole
from mesh.errors import MeshError, UsageError
from mesh.memory import Memory
from mesh.places import host_directory

CLEANING_S: Final = 0.1
"""A `mesh status` may be taking away what a kill left."""

POLL_S: Final = 0.02

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


@contextlib.contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Who makes, joins or leaves a mesh in this directory does so one after the other: its papers are
    several files. The directory itself is locked: `lock` is held by the node that runs there."""
    descriptor = os.open(private_directory(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # NFS locks no directory
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class StateDirectory:
    """The files of one running node. lock() first; everything else only under it."""

    def __init__(self, path: Path) -> None:
        self.path = private_directory(path)
        self.memory = Memory(self.path)
        self._lock: TextIO | None = None
        self._entry: Path | None = None

    def lock(self, patience_s: float = CLEANING_S) -> None:
        """Claims the directory for this process until unlock(). Raises UsageError if it stays taken."""
        deadline = time.monotonic() + patience_s
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MeshError(f"cannot write {self.path}: {error.strerror}") from None
        self._lock = open(descriptor, "w")  # noqa: SIM115 (held until unlock)
        try:
            while True:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(POLL_S)
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
        except (MeshError, OSError):
            self._entry = None  # found by --state all the same

    def write_running(self, node: NodeId, name: str, control: str) -> None:
        """node.json: {"node", "name", "pid", "control"}."""
        about = {"node": node, "name": name, "pid": os.getpid(), "control": control}
        write_whole(self.path / "node.json", json.dumps(about).encode())
