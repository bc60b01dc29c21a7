"""The rows of benchmarks/learning.py: how each trains, how good it has to be, at which rate."""

import math
from dataclasses import dataclass

import mesh
from mesh.conditions import REFERENCES
from mesh.core.strategies import STRATEGIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to train, and how far below one place it may end, in points of accuracy."""

    name: str
    strategy: str = "pair"
    every: int = 8
    momentum: bool = False
    """quasi-global"""
    codec: str = "f32"
    lost: float = 0.0
    replaced: float = 0.0
    attackers: int = 0
    guard: bool = True
    """what every node has: no exchange moves it further than is usual (mesh/core/guard.py)"""
    speeds: bool = False
    goals: tuple[tuple[str, str, float], ...] = ()
    """(split, averaged or worst, points)"""
    transfers: float | None = None
    """models that a node should send, about"""
    tuned_as: str = ""
    """the row whose rates this one takes: the same training under other conditions"""


def within(
    iid: float | None = None, dirichlet: float | None = None, worst: float | None = None
) -> tuple[tuple[str, str, float], ...]:
    goals = (("iid", "averaged", iid), ("dirichlet", "averaged", dirichlet))
    wanted = (*goals, ("dirichlet", "worst", worst))
    return tuple((split, what, points) for split, what, points in wanted if points is not None)


ROWS = (
    Row(name="one place, same samples", strategy="one-place", transfers=1500),
    Row(name="alone", strategy="alone", transfers=0),
    Row(name="pair, every 1", every=1, goals=within(0.5, 0.7), transfers=800),
    Row(name="pair, every 8", goals=within(0.5, 2.5), transfers=100),
    Row(name="pair, every 16", every=16, transfers=100),
    Row(
        name="pair + quasi-global momentum, every 8",
        momentum=True,
        goals=within(0.5, 1.0, 1.5),
        transfers=100,
    ),
    Row(
        name="the same, int8",
        momentum=True,
        codec="int8",
        goals=within(0.5, 1.0),
        transfers=25,
        tuned_as="pair + quasi-global momentum, every 8",
    ),
    Row(
        name="the same, 10 % lost, 20 % replaced",
        momentum=True,
        lost=0.1,
        replaced=0.2,
        goals=within(0.5, 1.5),
        transfers=100,
        tuned_as="pair + quasi-global momentum, every 8",
    ),
    Row(name="pair, every 8, int8", codec="int8", tuned_as="pair, every 8"),
    Row(
        name="pair, every 8, 10 % lost, 20 % replaced",
        lost=0.1,
        replaced=0.2,
        tuned_as="pair, every 8",
    ),
    Row(
        name="pair, every 8, speeds 10x apart",
        speeds=True,
        goals=within(0.5),
        tuned_as="pair, every 8",
    ),
    Row(name="outer, every 25", strategy="outer", every=25, goals=within(0.5, 5), transfers=32),
    Row(name="2 of 16 flip their sign: pair", attackers=2, transfers=300, tuned_as="pair, every 8"),
    Row(
        name="2 of 16 flip their sign: pair, no guard",
        attackers=2,
        guard=False,
        transfers=300,
        tuned_as="pair, every 8",
    ),
    Row(
        name="2 of 16 flip their sign: clip",
        strategy="clip",
        attackers=2,
        goals=within(1, 8),
        transfers=300,
    ),
)

CANDIDATES = (0.1, 0.14, 0.2, 0.28, 0.4, 0.57, 0.8, 1.13, 1.6, 2.3)
"""Rates a factor of 1.4 apart: between two of them the loss is flat. The least and the largest are further
out than any row's best."""

BEGIN_AT = 5
"""Of the candidates: near most rows' best. From there tuning climbs while the loss falls."""

RATES: dict[tuple[str, str], float] = {
    ("one place, same samples", "iid"): 1.13,  # 0.57:0.0212 0.8:0.0118 1.13:0.0066 1.6:0.0080
    (
        "one place, same samples",
        "dirichlet",
    ): 1.13,  # 0.57:0.0290 0.8:0.0153 1.13:0.0083 1.6:0.0075 2.3:2.3253
    ("alone", "iid"): 0.4,  # 0.2:0.1951 0.28:0.1873 0.4:0.1817 0.57:0.1865 0.8:0.3889
    ("alone", "dirichlet"): 0.4,  # 0.2:1.5728 0.4:1.4827 0.57:1.4717 0.8:1.8841
    ("pair, every 1", "iid"): 0.8,  # of 0.1, 0.2, 0.4, 0.8
    ("pair, every 1", "dirichlet"): 0.8,  # of 0.1, 0.2, 0.4, 0.8
    ("pair, every 8", "iid"): 0.8,  # 0.57:0.0284 0.8:0.0196 1.13:0.0169 1.6:2.3033
    ("pair, every 8", "dirichlet"): 0.57,  # 0.57:0.1283 0.8:0.1105 1.13:0.3359
    ("pair, every 16", "iid"): 0.8,  # of 0.1, 0.2, 0.4, 0.8
    ("pair, every 16", "dirichlet"): 0.8,  # of 0.1, 0.2, 0.4, 0.8
    (
        "pair + quasi-global momentum, every 8",
        "iid",
    ): 0.4,  # 0.28:0.0009 0.4:0.0006 0.57:0.0006 0.8:1.6816
    (
        "pair + quasi-global momentum, every 8",
        "dirichlet",
    ): 0.28,  # 0.28:0.0199 0.4:0.0162 0.57:0.1132 0.8:2.3284
    ("outer, every 25", "iid"): 0.57,  # 0.57:0.0341 0.8:0.0271 1.13:0.0455
    ("outer, every 25", "dirichlet"): 0.57,  # 0.4:0.1891 0.57:0.1688 0.8:0.1746
    ("2 of 16 flip their sign: clip", "iid"): 0.8,  # 0.57:0.0552 0.8:0.0497 1.13:0.0500
    ("2 of 16 flip their sign: clip", "dirichlet"): 0.57,  # 0.4:0.2969 0.57:0.2584 0.8:0.2698
}
"""(row, split) -> rate, as --tune prints them; rows that are not here take RATE."""

RATE = 0.2


def rate_of(row: Row, split: str) -> float:
    return RATES.get((row.tuned_as or row.name, split), RATE)


class Climb:
    """One row's way to the candidate of the least loss, by neighbours; losses have one valley.

    What is chosen is the rate at which the worse of two losses is least: its own, and that of the next
    larger rate. The best rate of one seed is often the last before training diverges, and does so on
    another seed; the reference's too.
    """

    def __init__(self, candidates: int, begin_at: int = BEGIN_AT) -> None:
        self._candidates = candidates
        self._begin_at = min(begin_at, candidates - 1)
        self.losses: dict[int, float] = {}

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda at: self.losses[at])

    @property
    def chosen(self) -> int:
        """Of the best and the one below, as beyond these both losses are larger."""
        below, above = (self.losses.get(self.best + side, math.inf) for side in (-1, 1))
        return self.best - 1 if below < above else self.best

    def asks(self) -> int | None:
        """The candidate to try next; None where both neighbours of the best are worse."""
        if not self.losses:
            return self._begin_at
        around = (self.best + 1, self.best - 1)
        return next((a for a in around if 0 <= a < self._candidates and a not in self.losses), None)


def missing(row: Row) -> str | None:
    """Why this row cannot be run, if it cannot."""
    if row.strategy not in (*STRATEGIES, *REFERENCES):
        return f"strategy {row.strategy!r} is not there yet"
    if row.momentum and "QuasiGlobalSGD" not in mesh.__all__:
        return "mesh.QuasiGlobalSGD is not there yet"
    return None
