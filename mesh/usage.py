"""How much of a processor this node and the trainings attached to it take, as `mesh top` shows it.

Rules: 1. One is one core: a training on four of them is 4. 2. The share is over the time since the last look,
a second at least. 3. A training counts with the processes that it started (data loaders); one that cannot be
looked at, as outside of Linux, makes the share unknown instead of too small.
A figure's trip: /proc -> CpuMeter.share() -> the journal -> Figures -> the others' tables.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

LOOK_S: Final = 1.0
PROCESSES_LIMIT: Final = 256
"""Of all trainings together; each costs a read of two small files, once a second."""


class CpuMeter:
    """One node's. `trainings` tells their process ids now."""

    def __init__(
        self,
        trainings: Callable[[], Iterable[int]],
        *,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainings = trainings
        self._proc = proc
        self._clock = clock
        self._own = os.getpid()
        self._looked_at = clock()
        self._seconds = self._look()
        self._share: float | None = None

    def share(self) -> float | None:
        """Cores in use since the last look; None until there were two."""
        now = self._clock()
        if now - self._looked_at >= LOOK_S:
            seconds = self._look()
            self._share = None
            if seconds is not None and (before := self._seconds) is not None:
                used_s = sum(seconds[pid] - before[pid] for pid in before.keys() & seconds.keys())
                self._share = max(0.0, used_s) / (now - self._looked_at)
            self._looked_at, self._seconds = now, seconds
        return self._share

    def _look(self) -> dict[int, float] | None:
        """CPU seconds of each process so far; None if a training's cannot be read."""
        found = {self._own: time.process_time()}
        for training in set(self._trainings()) - {self._own}:
            seconds = self._of(training)
            if seconds is None:
                return None
            found[training] = seconds
            left = self._children(training)
            while left and len(found) < PROCESSES_LIMIT:
                pid = left.pop()
                seconds = self._of(pid) if pid not in found else None
                if seconds is not None:  # else it is counted, this node itself, or gone by now
                    found[pid] = seconds
                    left += self._children(pid)
        return found

    def _of(self, pid: int) -> float | None:
        try:
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None

    def _children(self, pid: int) -> list[int]:
        """What its first thread started and is still there; empty where the kernel does not say."""
        try:
            listed = (self._proc / str(pid) / "task" / str(pid) / "children").read_text()
            return [int(child) for child in listed.split()]
        except (OSError, ValueError):
            return []
