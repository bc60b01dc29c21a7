"""The few things that a node does with files, so that a test can put a disk that fails in their place.

A file's trip: write_whole -> a temporary file, synced -> renamed to its name -> its directory synced;
a kill or a full disk at any point leaves the last good one. Rules: 1. Every operation does one thing
that can fail, and raises OSError if it does. 2. What was written is safe from a power cut only after
sync(), a rename only after sync_directory().
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from mesh.errors import MeshError


class Disk(Protocol):
    """Where files are. RealDisk here; SimulatedDisk loses what was not synced, and fails when told."""

    def read(self, path: Path) -> bytes:
        """All of a file."""

    def write(self, path: Path, data: bytes | bytearray) -> None:
        """Makes or empties a file that only its owner may read, and fills it. May fail half-way."""

    def sync(self, path: Path) -> None:
        """What the file holds is on the disk when this returns."""

    def rename(self, old: Path, new: Path) -> None:
        """In one step; a file that has the new name already is replaced."""

    def sync_directory(self, path: Path) -> None:
        """Which files the directory names is on the disk when this returns."""

    def remove(self, path: Path) -> None: ...

    def names(self, directory: Path) -> list[Path]:
        """The files in a directory."""


class RealDisk:
    """The operating system's."""

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def write(self, path: Path, data: bytes | bytearray) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        _sync(path)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def sync_directory(self, path: Path) -> None:
        _sync(path)

    def remove(self, path: Path) -> None:
        path.unlink()

    def names(self, directory: Path) -> list[Path]:
        return sorted(directory.iterdir())


REAL_DISK: Final = RealDisk()


def write_whole(path: Path, data: bytes | bytearray, disk: Disk = REAL_DISK) -> None:
    """Replaces a file, or leaves it as it was. Raises MeshError.

    Where only the last step failed (the directory's sync), the new file is in place, and after a
    power cut it is one or the other, whole: who gets MeshError must not rely on either.
    """
    with written_whole(path, disk) as temporary:
        disk.write(temporary, data)


@contextlib.contextmanager
def written_whole(path: Path, disk: Disk = REAL_DISK) -> Iterator[Path]:
    """Yields the file to fill; it gets the name `path` when it is whole and on the disk. Of anything
    else, a Ctrl-C as well, nothing is left. Raises MeshError; see write_whole()."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        disk.sync(temporary)
        disk.rename(temporary, path)
        disk.sync_directory(path.parent)
    except (OSError, MemoryError, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):
            disk.remove(temporary)
        if isinstance(error, OSError):
            raise MeshError(f"cannot write {path}: {error.strerror}") from None
        raise


def _sync(path: Path) -> None:
    """fsync takes the file, not what one descriptor wrote; an error that nobody was told is told."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
