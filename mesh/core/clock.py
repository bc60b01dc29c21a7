"""The mesh clock: how far a run has come, in steps of the mesh. The mean over its replicas, no number.

Each replica holds one part of it. A training's steps move its own part; every exchange moves both
parts together by the weights' own rule, so that sum(p * steps) stays and all parts go to the mean:

    delta = told - steps_j                     told: what the initiator said when it opened
    steps_j += share(p_i, p_j) * delta
    steps_i -= share(p_j, p_i) * delta         when the answer arrives

Rules: 1. Once per exchange and side: the responder keeps what it said beside the exchange's replies,
the initiator takes one answer once (Initiation.clock_answer). 2. Additive, whatever moved meanwhile:
so a part may be below zero for a moment, and readers take 0 for that. 3. A pull takes the donor's.
"""

from typing import Final

from mesh.core.exchange import share

CLOCK_LIMIT: Final = 2.0**53
"""Steps either way. Beyond it float64 counts no single steps; no training makes so many."""


class MeshClock:
    """One replica's part of its run's clock."""

    def __init__(self, steps: float = 0.0) -> None:
        self.steps = steps

    @property
    def shown(self) -> int:
        """Whole steps, as people and schedules read them."""
        return max(0, int(self.steps))

    def add(self, steps: float) -> None:
        """The training made so many steps."""
        self._set(self.steps + steps)

    def answer(self, told: float, theirs: float, mine: float, *, halved: bool) -> float:
        """The responder's move; `theirs` and `mine` are the weights p. Returns what to say.

        `halved`: our own request is under way as well, and two full steps would swap the parts. What
        is said then lies half-way to `told`, so that the initiator's one rule takes half a step too.
        """
        delta = told - self.steps
        if halved:
            delta /= 2
        self._set(self.steps + share(theirs, mine) * delta)
        return told - delta

    def answered(self, told: float, said: float, theirs: float, mine: float) -> None:
        """The initiator's move, from what it told and what the responder said."""
        self._set(self.steps - share(theirs, mine) * (told - said))

    def take(self, said: float) -> None:
        """A pull's: the donor's weights are here now, and so is its clock."""
        self._set(said)

    def _set(self, steps: float) -> None:
        self.steps = min(max(steps, -CLOCK_LIMIT), CLOCK_LIMIT)
