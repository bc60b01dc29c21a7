"""A task that waits for a time which others may bring nearer, and the clock that makes it cheap.

An alarm's trip: wait(until) -> somebody's hasten(at), any number of times -> the task runs again.
Rules: 1. Under a real clock its deadline is a CancelScope's. 2. Under a JumpClock it is an
entry in a heap: trio's scopes, their deadlines and cancellations were a quarter of a simulation's profile.
"""

from heapq import heapify, heappop, heappush
from math import ceil, inf
from typing import Final

import trio

IDLE_S: Final = 0.05
"""How long to look for the outside where no task has a deadline: Ctrl-C, or a run that hangs."""

STALE: Final = 1000
"""Entries in the heap before it is first looked through for those that mean nothing any more."""


class Alarm:
    """Wakes the one task that waits for it."""

    __slots__ = ("_clock", "_scope", "_task", "at")

    def __init__(self) -> None:
        self.at = inf
        """when it rings, while somebody waits"""
        self._task: trio.lowlevel.Task | None = None
        self._clock: JumpClock | None = None
        self._scope: trio.CancelScope | None = None

    async def wait(self, until: float) -> None:
        """Returns at `until`, or sooner if it is hastened."""
        self.at = until
        self._task = trio.lowlevel.current_task()
        clock = trio.lowlevel.current_clock()
        if isinstance(clock, JumpClock):
            self._clock = clock
            if until < inf:
                clock.set(self)
            await trio.lowlevel.wait_task_rescheduled(self._abandoned)
        else:
            with trio.CancelScope(deadline=until) as self._scope:
                await trio.lowlevel.wait_task_rescheduled(self._abandoned)

    def hasten(self, at: float) -> None:
        """The waiting task, if there is one, goes on at `at` or sooner."""
        if self._task is None or at >= self.at:
            return
        self.at = at
        if at <= trio.current_time():
            self.ring()
        elif self._clock is not None:
            self._clock.set(self)
        elif self._scope is not None:
            self._scope.deadline = at

    @property
    def waits(self) -> bool:
        """Whether a task waits for it."""
        return self._task is not None

    def ring(self) -> None:
        """The waiting task, if there is one, goes on now."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _abandoned(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


async def sleep(seconds: float) -> None:
    """trio.sleep() at the price of an alarm."""
    await Alarm().wait(trio.current_time() + seconds)


class JumpClock(trio.abc.Clock):
    """A clock that jumps, to the next deadline or alarm. trio's MockClock does the same with an extra
    turn of the loop for each jump and a look at the real clock for each question."""

    def __init__(self, tick_s: float = 0.0) -> None:
        """`tick_s`: what is due within one tick happens at its end, in one turn of trio's loop; a
        power of two, so that sums of it are exact."""
        self._tick_s = tick_s
        self._now = 0.0
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._set = 0
        self._look_through_at = STALE

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def set(self, alarm: Alarm) -> None:
        """It rings at alarm.at, if somebody waits for it then and that is still when."""
        self._set += 1
        heappush(self._alarms, (alarm.at, self._set, alarm))
        if len(self._alarms) > self._look_through_at:
            self._alarms = [entry for entry in self._alarms if _is_meant(entry)]
            heapify(self._alarms)
            self._look_through_at = 2 * len(self._alarms) + STALE

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """trio asks this when no task can run."""
        alarms = self._alarms
        while alarms and not _is_meant(alarms[0]):
            heappop(alarms)
        if alarms:
            deadline = min(deadline, alarms[0][0])
        if deadline > 1e15:
            return IDLE_S
        if self._tick_s:
            deadline = max(deadline, ceil(deadline / self._tick_s) * self._tick_s)
        self._now = max(self._now, deadline)
        while alarms and alarms[0][0] <= self._now:
            entry = heappop(alarms)
            if _is_meant(entry):
                entry[2].ring()
        return 0.0


def _is_meant(entry: tuple[float, int, Alarm]) -> bool:
    at, _, alarm = entry
    return alarm.waits and alarm.at == at
