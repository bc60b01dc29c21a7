"""Local health (Lifeguard, Dadgar et al. 2018): how far this node trusts its own ears.

Rules: 1. A node that was stopped, starved or cut off must not take it for the deaths of others: its
score makes it wait longer before it accuses. 2. The score rises where only this node can be at fault
(its loop ran late, helpers that live do not even answer, others suspect it) and falls with each probe
that is acknowledged. 3. That nobody at all is heard is no such sign: a minority that is cut off, or a
lone survivor, would need minutes to find it out. 4. A member that was suspected and lived has a bad line,
or stalls: for a while it is waited for longer.
"""

import math

from mesh.core.membership import INCARNATION_BLOCK
from mesh.core.messages import NodeId

WORST = 8
"""memberlist's AwarenessMaxMultiplier: at most this much slower."""

LAG_S = 0.25
"""A loop this late was not just busy with a fragment (3 ms) or a hand-over (40 ms)."""

REFUTED_S = 60.0
SECOND_CHANCE = 2
"""So many times as long a suspicion lasts of who refuted one lately. Of three nodes that lose a third of all
packets, one was called dead every few minutes, each time after a dozen suspicions that it had refuted."""


class Health:
    """The score: 0 is well, WORST - 1 the worst."""

    def __init__(self) -> None:
        self.score = 0
        self._suspected_at: dict[NodeId, float] = {}
        """of who refuted it"""

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

    def refuted(self, node: NodeId, suspected_at: float, raised_by: int) -> None:
        """It was suspected then, and lives; or it began again, which raises its incarnation by a block,
        and says nothing of its line."""
        if raised_by < INCARNATION_BLOCK // 2:
            self._suspected_at[node] = suspected_at

    def forget(self, node: NodeId) -> None:
        self._suspected_at.pop(node, None)

    def chances(self, node: NodeId, now: float) -> int:
        """How many times as long as usual a suspicion of it lasts that begins now."""
        lately = now - self._suspected_at.get(node, -math.inf) < REFUTED_S
        return SECOND_CHANCE if lately else 1
