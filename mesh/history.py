"""What a run did over time, in bounded memory: its curve, and how fast it goes now.

Rules: 1. A curve has at most POINTS_LIMIT points: when it is full every second one goes and the
interval between two doubles, so an hour and a month cost the same. 2. Its last point is always the
newest. 3. Rates are of the last seconds, and fall while nothing comes.
A point's trip: a hand-over -> Node.posted() -> Journal.posted() -> Curve.add() -> `mesh plot`.
"""

from collections import deque
from typing import Final, NamedTuple

POINTS_LIMIT: Final = 512
"""More than a terminal has columns and a plot has places; 512 points of one run are 50 kB."""

FIRST_INTERVAL_S: Final = 1.0
"""Between two points at first: a curve of 8.5 minutes; then 17, 34, ..."""

MARKS_KEPT: Final = 10
"""Marks, one a second, that a rate is taken over: long enough for slow machines' hand-overs."""


class Point(NamedTuple):
    """One moment of a run. Sizes are bytes since it attached."""

    uptime_s: float
    """of the node"""
    step: int
    loss: float | None
    drift: float | None
    samples: int
    bytes_sent: int
    bytes_received: int


class Curve:
    """The points of one run."""

    def __init__(self) -> None:
        self.interval_s = FIRST_INTERVAL_S
        self._points: list[Point] = []
        self._newest: Point | None = None

    def add(self, point: Point) -> None:
        """Takes in a point; one that is too close to the last is kept until the next comes."""
        self._newest = point
        if self._points and point.uptime_s - self._points[-1].uptime_s < self.interval_s:
            return
        self._points.append(point)
        if len(self._points) >= POINTS_LIMIT:
            del self._points[1::2]
            self.interval_s *= 2

    def points(self, limit: int = POINTS_LIMIT) -> list[Point]:
        """At most `limit` points (2 or more), evenly chosen, the first and the newest among them."""
        points = [*self._points]
        if self._newest is not None and points[-1] is not self._newest:
            points.append(self._newest)
        if len(points) > limit:
            last = len(points) - 1
            points = [points[round(i * last / (limit - 1))] for i in range(limit)]
        return points


class Mark(NamedTuple):
    """Where a run's counters stood."""

    at_s: float
    samples: int
    bytes_sent: int
    bytes_received: int


class Rates(NamedTuple):
    """Each per second."""

    samples_s: float
    out_bytes_s: float
    in_bytes_s: float


class Meter:
    """How fast a run goes."""

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque(maxlen=MARKS_KEPT)

    def mark(self, mark: Mark) -> bool:
        """Takes in a mark; False where the last is less than a second old."""
        if self._marks and mark.at_s - self._marks[-1].at_s < 1.0:
            return False
        self._marks.append(mark)
        return True

    def rates(self, now: Mark) -> Rates:
        """Over the marks that are kept, up to now."""
        if not self._marks or now.at_s <= self._marks[0].at_s:
            return Rates(0.0, 0.0, 0.0)
        first = self._marks[0]
        seconds = now.at_s - first.at_s
        return Rates(
            (now.samples - first.samples) / seconds,
            (now.bytes_sent - first.bytes_sent) / seconds,
            (now.bytes_received - first.bytes_received) / seconds,
        )
