"""How long a member stays suspect before it is called dead (Lifeguard, Dadgar et al. 2018).

A suspicion that nobody confirms may be the fault of the one who has it. Each that finds the same by
itself shortens it, with the logarithm of their number, until CONFIRMATIONS have, or all there are.
"""

import math
from dataclasses import dataclass, field

from mesh.core.membership import LARGE
from mesh.core.messages import Member

ALONE_S = 6.0
"""Times max(1, log10 n): the suspicion of one, twice the 3 s of memberlist's local network."""

CONFIRMED_S = 2.8
"""A process stopped for 3 s is not called dead: it is suspect 0.5 s after its last word at the soonest, and
has 0.3 s left to be heard in, enough for a packet that TCP sends twice (0.2 s later). In a large mesh
longer, with the logarithm of the members: a refutation has hops to travel."""

CONFIRMATIONS = 3

FEW_S = 3.6
"""Where there are not so many others, all of them may hear badly at once: of three nodes that lose a third
of all packets one was called dead after 2.8 s. A connection to a dead machine still ends within 6 s."""


@dataclass(slots=True)
class Suspicion:
    """Of one member, at one of its incarnations."""

    incarnation: int
    since: float
    accusers: int
    wanted: int
    """confirmations that shorten it"""
    alone_s: float
    """how long it lasts without any"""
    confirmed_s: float
    """and with all of them"""
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
            return self.confirmed_s
        accusers = max(1, min(self.accusers, self.wanted + 1))
        shortened = math.log(accusers) / math.log(self.wanted + 1)
        return self.alone_s - (self.alone_s - self.confirmed_s) * shortened


def suspicion_of(row: Member, living: int, since: float, times: int = 1) -> Suspicion:
    """A new one, `times` as long as usual. `living`: members in the table, the suspect and this node
    included."""
    wanted, confirmed_s = min(CONFIRMATIONS, living - 2), FEW_S
    if wanted == CONFIRMATIONS:
        confirmed_s = CONFIRMED_S * max(1.0, math.log(living, LARGE))
    return Suspicion(
        incarnation=row.incarnation,
        since=since,
        accusers=len(row.accusers),
        wanted=wanted,
        alone_s=times * ALONE_S * max(1.0, math.log10(max(1, living))),
        confirmed_s=times * confirmed_s,
    )
