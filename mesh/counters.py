"""What a run and its node did, counted: exchanges, bytes, and how long exchanges took."""

from bisect import bisect_left
from dataclasses import astuple, dataclass, field
from operator import add
from typing import Final

from mesh.core.events import Outcome

BOUNDS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds by which durations are counted: a small model on a cable takes 2 ms, 400 MB over Wi-Fi
half a minute."""


@dataclass(slots=True)
class Counters:
    """What a run did since it attached. Lengths are in bytes, with headers, without TLS."""

    completed: int = 0
    answered: int = 0
    resumed: int = 0
    refused: int = 0
    failed: int = 0
    pulled: int = 0
    non_finite: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(slots=True)
class Durations:
    """How long things took, in memory that does not grow: how many fell under each of BOUNDS_S."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """the last: longer than all bounds"""
    total_s: float = 0.0

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.total_s += duration_s


@dataclass(slots=True)
class Totals:
    """What a node did since it started, whatever became of its runs."""

    ended: Counters = field(default_factory=Counters)
    """of all runs that ended"""
    exchanges: dict[Outcome, Durations] = field(
        default_factory=lambda: {outcome: Durations() for outcome in Outcome}
    )
    """those that this node began"""

    def run_ended(self, counters: Counters) -> None:
        self.ended = Counters(*map(add, astuple(self.ended), astuple(counters)))
