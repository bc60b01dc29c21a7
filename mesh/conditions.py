"""What a mesh of the laboratory is, and what befalls it; checked where it enters."""

from dataclasses import dataclass
from typing import Final

from mesh.core.strategies import STRATEGIES
from mesh.errors import UsageError

ALONE: Final = "alone"
ONE_PLACE: Final = "one-place"
REFERENCES: Final = (ALONE, ONE_PLACE)
NODES_LIMIT: Final = 256
STEP_S: Final = 0.01
"""Virtual seconds of a step at speed 1: longer than a small model's exchange, as in life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a mesh of the laboratory is and what befalls it."""

    nodes: int
    seed: int
    strategy: str | None = None
    """None: what each program says itself"""
    codec: str | None = None
    steps: int | None = None
    """of a machine at mean speed; None: as many as its program makes"""
    speeds: tuple[float, ...] = ()
    loss_of_connections: float = 0.0
    replaced: float = 0.0
    attackers: frozenset[int] = frozenset()
    look_every: int = 10
    """steps"""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if not 1 <= self.nodes <= NODES_LIMIT:
            raise UsageError(f"nodes={self.nodes!r}: 1..{NODES_LIMIT}")
        if self.strategy not in (None, *STRATEGIES, *REFERENCES):
            known = ", ".join((*STRATEGIES, *REFERENCES))
            raise UsageError(f"strategy={self.strategy!r}: one of {known}")
        if self.speeds and (len(self.speeds) != self.nodes or min(self.speeds) <= 0):
            raise UsageError(f"speeds: one above 0 for each of {self.nodes} nodes")
        if not 0 <= self.loss_of_connections < 1:
            raise UsageError("loss_of_connections: a share from 0, below 1")
        if not 0 <= self.replaced <= 1:
            raise UsageError("replaced: a share from 0 to 1")
        if not self.attackers <= set(range(1, self.nodes + 1)):
            raise UsageError(f"attackers: ranks from 1 to {self.nodes}")
        if self.replaced and (self.steps is None or not self.meets):
            raise UsageError("replaced: of a mesh that makes a known number of steps")
        if len(self.attackers) == self.nodes:
            raise UsageError("attackers: somebody has to be honest")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps={self.steps!r}: a whole number from 1")
        if self.look_every < 1:
            raise UsageError(f"evaluate_every={self.look_every!r}: a whole number from 1")

    @property
    def meets(self) -> bool:
        """Whether there is a mesh at all."""
        return self.strategy not in REFERENCES
