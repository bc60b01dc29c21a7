"""A disk in memory that fails when told, and that forgets at a power cut what was not synced.

It holds two versions of everything: what programs see, and what is durable. Rules: 1. write() changes
what is seen; sync() makes a file's bytes durable, sync_directory() the names in a directory. 2. At
crash() each file that was not synced is, by a seeded coin, as it was, as it would be, empty, or torn;
each name that was not synced is as it was or as it would be. 3. The same seed, the same fate.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

Faults = Callable[[str], OSError | None]
"""From the name of an operation to what it fails with; None: it works."""


class _File:
    """The bytes that a name leads to; a rename moves it whole."""

    def __init__(self) -> None:
        self.seen = b""
        self.durable = b""


def disk_error(number: int) -> OSError:
    """As the operating system would raise it: errno.ENOSPC, errno.EIO, ..."""
    return OSError(number, os.strerror(number))


def fails_at(call: int, number: int) -> Faults:
    """The `call`-th operation from now, counted from 0, fails; all others work."""
    left = call

    def faults(_: str) -> OSError | None:
        nonlocal left
        left -= 1
        return disk_error(number) if left == -1 else None

    return faults


def fails_often(rng: Random, probability: float) -> Faults:
    """Each operation fails with this probability: the disk is full, or broken."""

    def faults(_: str) -> OSError | None:
        if rng.random() >= probability:
            return None
        return disk_error(rng.choice((errno.ENOSPC, errno.EIO)))

    return faults


class SimulatedDisk:
    """See mesh.disk.Disk. Directories need not be made."""

    def __init__(self, rng: Random, faults: Faults | None = None) -> None:
        self._rng = rng
        self.faults = faults
        """asked before each operation; may be replaced at any time"""
        self._seen: dict[Path, _File] = {}
        self._durable: dict[Path, _File] = {}

    def read(self, path: Path) -> bytes:
        self._may_fail("read")
        return self._file(path).seen

    def write(self, path: Path, data: bytes | bytearray) -> None:
        error = self.faults("write") if self.faults is not None else None
        file = self._seen.setdefault(path, _File())
        if error is not None:
            file.seen = bytes(data[: self._rng.randint(0, len(data))])
            raise error
        file.seen = bytes(data)

    def sync(self, path: Path) -> None:
        self._may_fail("sync")
        file = self._file(path)
        file.durable = file.seen

    def rename(self, old: Path, new: Path) -> None:
        self._may_fail("rename")
        self._seen[new] = self._file(old)
        if new != old:
            del self._seen[old]

    def sync_directory(self, path: Path) -> None:
        self._may_fail("sync_directory")
        for name in [n for n in self._durable if n.parent == path and n not in self._seen]:
            del self._durable[name]
        for name, file in self._seen.items():
            if name.parent == path:
                self._durable[name] = file

    def remove(self, path: Path) -> None:
        self._may_fail("remove")
        self._file(path)
        del self._seen[path]

    def names(self, directory: Path | None = None) -> list[Path]:
        """Of all files that a program sees, or of those in one directory."""
        return sorted(path for path in self._seen if directory in (None, path.parent))

    def crash(self) -> None:
        """The power is cut and comes back: what is left is seen, and durable, from now on."""
        names = sorted({*self._seen, *self._durable})
        left: dict[Path, _File] = {}
        for name in names:
            old, new = self._durable.get(name), self._seen.get(name)
            file = old if old is new else self._rng.choice((old, new))
            if file is not None:
                left[name] = file
        for name, file in list(left.items()):  # a rename is one step: a file has one name
            if self._seen.get(name) is not file and list(left.values()).count(file) > 1:
                del left[name]
        for file in left.values():
            file.seen = file.durable = self._what_is_left(file)
        self._seen, self._durable = left, dict(left)

    def _what_is_left(self, file: _File) -> bytes:
        if file.seen == file.durable:
            return file.seen
        torn = file.seen[: self._rng.randint(0, len(file.seen))]
        return self._rng.choice((file.durable, file.seen, b"", torn))

    def _file(self, path: Path) -> _File:
        if path not in self._seen:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return self._seen[path]

    def _may_fail(self, operation: str) -> None:
        error = self.faults(operation) if self.faults is not None else None
        if error is not None:
            raise error
