"""How far one exchange may move a replica: the default guard of every strategy that averages pairs.

An exchange's trip: the initiator sends its reach() -> the responder takes the smaller of the two and
clips the deltas of the whole exchange to it, so that both sides apply the same and the mass stays ->
the initiator, which believes nobody, refuses a delta beyond its own reach -> heard() learns from what
was applied. Without an attack, and while replicas move as they used to, nothing is ever clipped.
"""

import math
from collections import deque

DISTANCES_KEPT = 32
ENOUGH = 8
"""Distances below which nothing is known yet: a run's first exchanges are never clipped."""

MULTIPLE = 10.0
"""Of the median: pair distances of one mesh spread by a factor of two or three, those of a model with
its signs flipped, or of one that diverged, are a hundred times the median."""

FLOOR = 0.01
"""Of the weights' norm: what healthy replicas lie apart."""

ROUNDING = 1.1
"""Of a square length: what a coarse codec may add to a delta that was clipped before it was written."""


class Guard:
    """One run's. Lengths are norms of differences between whole replicas (or parts, for `cyclic`)."""

    def __init__(self) -> None:
        self._lengths: deque[float] = deque(maxlen=DISTANCES_KEPT)

    def heard(self, square_distance: float) -> None:
        """An exchange that this node began is complete. Only those count: its peers are chosen at
        random, so that a few attackers cannot shift the median by asking often."""
        self._lengths.append(math.sqrt(square_distance))

    def reach(self, progress: float, norm: float) -> float | None:
        """The longest delta that an exchange may bring; None where too little is known.

        `progress`: how far the last hand-over moved this replica. Those that train again after a rest
        are further apart than they were in their sleep. `norm`: of the replica; some small part of it
        is always allowed, or one that never moves by itself could never be moved again.
        """
        if len(self._lengths) < ENOUGH:
            return None
        middle = sorted(self._lengths)[len(self._lengths) // 2]
        return max(MULTIPLE * max(middle, progress), FLOOR * norm) or None


def room(reach: float | None, other: float | None, used: float) -> float:
    """What is left, as a square length, under the smaller of two reaches after `used`."""
    smaller = min((r for r in (reach, other) if r is not None), default=math.inf)
    return max(0.0, smaller * smaller - used)


def too_long(reach: float | None, used: float) -> bool:
    """Whether deltas of this square length in sum are more than was asked for."""
    return reach is not None and used > ROUNDING * reach * reach
