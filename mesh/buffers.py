"""Large buffers that are made once and taken again: a fresh one costs a page fault for each 4 KiB."""


class BufferPool:
    """Buffers of one length, reused."""

    def __init__(self, length: int, kept: int | None = None) -> None:
        """`kept`: how many wait for use at most; None: all that were ever in use at once."""
        self._length = length
        self._kept = kept
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(self._length))

    def give(self, buffer: memoryview) -> None:
        if self._kept is None or len(self._free) < self._kept:
            self._free.append(buffer)
