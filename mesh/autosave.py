"""A training's checkpoints while it runs, and its return after a crash: join(checkpoint=DIR).

A checkpoint's trip: node.step() finds one due -> a copy of model and optimizer is made in the
training's thread, because they change at the next step -> a thread of its own hashes, writes and syncs
it, while training goes on -> at the next start, resume() brings both back before anything is attached.

Rules: 1. One at a time: while one is being written none is due. 2. What cannot be written is told
once and tried again later; the last good one stays. 3. One training at a time uses a file: two that
wrote in turns would resume each other.
"""

import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from pathlib import Path

import torch

from mesh.checkpoint import CheckpointInfo, Snapshot, load_generation
from mesh.errors import MeshError, UsageError
from mesh.generations import write_generation

logger = logging.getLogger("mesh")

LATE_S = 60.0
"""A checkpoint that is due waits so long for the next hand-over, where it wants something of it: a slow
training hands over every minute or so. Then it is written without."""

_USED_HERE: set[Path] = set()
"""Files of trainings of this process: the lock below keeps only other processes out."""


class Autosave:
    """Writes one run's checkpoints into a directory, `every_s` seconds apart or more."""

    def __init__(self, directory: str | os.PathLike[str], run: str, every_s: float) -> None:
        """Raises MeshError if the directory cannot be used, UsageError if another training uses it."""
        self.path = Path(directory) / f"{_file_name(run)}.json"
        self._run = run
        self._every_s = every_s
        self._due_at = time.monotonic() + every_s
        self._thread: threading.Thread | None = None
        self._failing = False
        self._lock = -1
        self._key = self.path.resolve()
        if self._key in _USED_HERE:
            raise UsageError(
                f"this process keeps checkpoints of run {run!r} in {directory} already: close() what "
                "join() gave before (in a notebook), or give each training a directory of its own"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._lock = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        except OSError as error:
            raise MeshError(
                f"cannot use {directory} for checkpoints: {error.strerror}; "
                "choose another with checkpoint="
            ) from None
        _USED_HERE.add(self._key)
        try:
            # Not flock: forked data loaders would hold that a while after a kill, and nothing could resume.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise UsageError(
                f"another training of run {run!r} keeps its checkpoints in {directory}: "
                "give each machine's training a directory of its own"
            ) from None
        except OSError:
            pass  # a file system without locks

    def resume(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> CheckpointInfo | None:
        """Fills model and optimizer from the checkpoint of this run; None where there is none yet.

        Raises UsageError, with both as they were, if it is damaged or another model's.
        """
        if not self.path.exists():
            return None
        info = load_generation(self.path, model, optimizer)
        if info.run != self._run:
            raise UsageError(f"{self.path} is of run {info.run!r}, not {self._run!r}: move it away")
        logger.info("run %r resumes at step %d from %s", info.run, info.step, self.path)
        return info

    def due(self) -> bool:
        """Whether it is time for the next one, and the last is written."""
        return time.monotonic() >= self._due_at and not (self._thread and self._thread.is_alive())

    def late(self) -> bool:
        """Whether it has been due for long."""
        return time.monotonic() >= self._due_at + LATE_S

    def start(self, snapshot: Snapshot | None) -> None:
        """Writes it, if there is one, in a thread of its own. Call only when one is due."""
        self._due_at = time.monotonic() + self._every_s
        if snapshot is None:
            return
        self._thread = threading.Thread(target=self._write, args=snapshot, name="mesh checkpoint")
        self._thread.start()

    def finish(self, snapshot: Snapshot | None) -> None:
        """Waits until the last one is written, and writes `snapshot`, the very last, if there is one.

        Then another training may use the file.
        """
        try:
            if self._thread is not None:
                self._thread.join()
            if snapshot is not None:
                self._write(*snapshot, last=True)
        finally:
            self.close()

    def close(self) -> None:
        """Gives the file free. Harmless twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            _USED_HERE.discard(self._key)

    def _write(
        self, about: dict[str, object], tensors: bytes | bytearray, *, last: bool = False
    ) -> None:
        """Says once that it fails, and again of the last: what it would have held is lost."""
        try:
            write_generation(self.path, about, tensors)
        except MeshError as error:
            if last:
                logger.warning(
                    "%s: what was learned since the checkpoint before is not saved", error
                )
            elif not self._failing:
                logger.warning("%s: the checkpoint before stays; training goes on", error)
            self._failing = True
        else:
            if self._failing:
                logger.warning("checkpoints are written again: %s", self.path)
            self._failing = False


def _file_name(run: str) -> str:
    """The run's name; where it is no good name for a file, what is good of it and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", run)
    if plain == run and not run.startswith("."):
        return run
    return f"run-{plain.strip('.')}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
