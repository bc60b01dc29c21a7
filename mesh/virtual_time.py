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

from mesh.alarm import JumpClock

SELDOM: Final = 10_000_000
"""Allocations between two looks for cycles. A life leaves 2000 objects in some; at 700, Python's own, or
at 100 000 in a mesh of a thousand, looking for them is a tenth of the time."""

Result = TypeVar("Result")


def run_seeded(
    main: Callable[..., Awaitable[Result]], seed: int, *args: object, tick_s: float = 0.0
) -> Result:
    """Runs `main(rng, *args)` in virtual time; the same seed gives the same run, task by task.

    tick_s: time moves in whole ticks, and what is due within one happens at its end: a mesh of
    thousands is cheaper so. 0: each deadline has a moment of its own.
    """
    # trio shuffles the tasks that can run, so that nobody relies on their order: with the seed's
    # shuffle, and in an order before it that does not depend on addresses in memory.
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(seed)
    before = gc.get_threshold()
    gc.set_threshold(SELDOM)
    try:
        return trio.run(main, Random(seed), *args, clock=JumpClock(tick_s))
    finally:
        gc.set_threshold(*before)
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = False  # type: ignore[misc]
