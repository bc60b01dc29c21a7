"""Large buffers that are made once and taken again: a fresh one costs a page fault for each 4 KiB."""

import mmap
from typing import Final

PAGES_BYTES: Final = 1 << 16
"""From here on a buffer has pages of its own: it is copied and computed with faster than where malloc puts it,
16 bytes into a page. Below, the rest of its last page would be much of it."""


class BufferPool:
    """Buffers of one length, reused."""

    def __init__(self, length: int, kept: int | None = None) -> None:
        """`kept`: how many wait for use at most; None: all that were ever in use at once."""
        self._length = length
        self._kept = kept
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        return self._free.pop() if self._free else self._fresh()

    def give(self, buffer: memoryview) -> None:
        if self._kept is None or len(self._free) < self._kept:
            self._free.append(buffer)

    def _fresh(self) -> memoryview:
        if self._length < PAGES_BYTES:
            return memoryview(bytearray(self._length))
        return memoryview(mmap.mmap(-1, self._length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON))
