"""Ctrl-C waits for the end of a hand-over: half of one would count a layer's progress twice.

A notebook's user interrupts a cell and runs the next one with the same model; between a read and a
write of the two shared buffers that must not happen.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block SIGINT is only remembered; its handler runs after it. Never wait inside."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[-1])
