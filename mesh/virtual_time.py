"""Virtual time under trio: a second costs nothing, and one seed decides in which order tasks run.

Rules: 1. Time moves only when every task waits, then straight to the next deadline. 2. Nothing in
such a run waits for the outside: no threads, no sockets.
"""

import gc
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, TypeVar

import trio
from trio._core import _run as trio_run

IDLE_S: Final = 0.05
"""How long to look for the outside where no task has a deadline: Ctrl-C, or a run that hangs."""

SELDOM: Final = 100_000
"""Allocations between two looks for cycles: at 700, Python's own, that is a tenth of the time."""

Result = TypeVar("Result")


class JumpClock(trio.abc.Clock):
    """A clock that jumps. trio's MockClock does the same with an extra turn of the loop for each jump
    and a look at the real clock for each question: half of a simulation's time."""

    def __init__(self) -> None:
        self._now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """trio asks this when no task can run."""
        if deadline > 1e15:
            return IDLE_S
        self._now = max(self._now, deadline)
        return 0.0


def run_seeded(main: Callable[..., Awaitable[Result]], seed: int, *args: object) -> Result:
    """Runs `main(rng, *args)` in virtual time; the same seed gives the same run, task by task."""
    # trio shuffles the tasks that can run, so that nobody relies on their order: with the seed's
    # shuffle, and in an order before it that does not depend on addresses in memory.
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(seed)
    before = gc.get_threshold()
    gc.set_threshold(SELDOM)
    try:
        return trio.run(main, Random(seed), *args, clock=JumpClock())
    finally:
        gc.set_threshold(*before)
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = False  # type: ignore[misc]
