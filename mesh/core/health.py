"""Local health (Lifeguard, Dadgar et al. 2018): how far this node trusts its own ears.

Rules: 1. A node that was stopped, starved or cut off must not take it for the deaths of others: its
score makes it wait longer before it accuses. 2. The score rises where only this node can be at fault
(its loop ran late, helpers that live do not even answer, others suspect it) and falls with each probe
that is acknowledged. 3. That nobody at all is heard is no such sign: a minority that is cut off, or a
lone survivor, would need minutes to find it out.
"""

WORST = 8
"""memberlist's AwarenessMaxMultiplier: at most this much slower."""

LAG_S = 0.25
"""A loop this late was not just busy with a fragment (3 ms) or a hand-over (40 ms)."""


class Health:
    """The score: 0 is well, WORST - 1 the worst."""

    def __init__(self) -> None:
        self.score = 0

    @property
    def multiplier(self) -> int:
        """What probe intervals and timeouts are multiplied with."""
        return self.score + 1

    def change(self, by: int) -> None:
        self.score = max(0, min(WORST - 1, self.score + by))

    def forgiven_s(self, lag_s: float) -> float:
        """By how much everybody else's deadlines move when this node's loop was `lag_s` late."""
        if lag_s <= LAG_S:
            return 0.0
        self.change(+1)
        return lag_s
