"""How long a member stays suspect before it is called dead (Lifeguard, Dadgar et al. 2018).

A suspicion that nobody confirms may be the fault of the one who has it, so it lasts twice as long as
one that CONFIRMATIONS others share; in between it shrinks with the logarithm of their number.
"""

import math
from dataclasses import dataclass, field

from mesh.core.messages import Member

SUSPICION_S = 3.0
"""Confirmed: 3 * max(1, log10 n) s. A process stopped for 3 s refutes in time (it is suspect after 1 s
at the soonest), and news has log n hops to travel."""

CONFIRMATIONS = 3


@dataclass(slots=True)
class Suspicion:
    """Of one member, at one of its incarnations."""

    incarnation: int
    since: float
    accusers: int
    wanted: int
    """confirmations after which it lasts no longer than base_s"""
    base_s: float
    confirmed_at: float = -math.inf
    _lasts_s: float = field(init=False)
    """kept: the deadline is asked for at every turn of the loop"""

    def __post_init__(self) -> None:
        self._lasts_s = self._length_s()

    def confirmed(self, accusers: int, now: float) -> None:
        """So many find the same."""
        self.accusers, self.confirmed_at = accusers, now
        self._lasts_s = self._length_s()

    @property
    def deadline(self) -> float:
        """Never before the last confirmation: a deadline that a message moves into the past would
        look as if this node's loop had been late (health.py)."""
        return max(self.since + self._lasts_s, self.confirmed_at)

    def _length_s(self) -> float:
        if self.wanted <= 0:
            return self.base_s
        accusers = max(1, min(self.accusers, self.wanted + 1))
        return self.base_s * (2 - math.log(accusers) / math.log(self.wanted + 1))


def suspicion_of(row: Member, living: int, since: float) -> Suspicion:
    """A new one. `living`: members in the table, the suspect and this node included."""
    return Suspicion(
        incarnation=row.incarnation,
        since=since,
        accusers=len(row.accusers),
        wanted=min(CONFIRMATIONS, living - 2),
        base_s=SUSPICION_S * max(1.0, math.log10(max(1, living))),
    )
