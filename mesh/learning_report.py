"""What a laboratory found: curves of each node, looks at all of them, and the averaged weights.

Rule: a curve is bounded. When it is full, every second point goes and only every second is kept from
then on, so that a training of any length has between half of POINTS and POINTS of them.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import numpy as np

from mesh.arrays import Floats

POINTS: Final = 4096
"""Of one curve: more than a plot can show."""

Value = TypeVar("Value")


class Curve(Generic[Value]):
    """Values by place, of which it keeps at most `points`."""

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._every = 1
        self._seen = 0
        self.values: list[Value] = []

    def add(self, value: Value) -> None:
        if self._seen % self._every == 0:
            if len(self.values) == self._points:
                del self.values[1::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self.values.append(value)
        self._seen += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What `evaluate` said of the nodes' models, and of the average of all."""

    mean: float
    worst: float
    averaged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All replicas at one moment."""

    step: float
    """of the mesh: the mean over its nodes"""
    virtual_s: float
    drift: float
    """consensus distance: RMS distance of the replicas to their mean"""
    accuracy: Accuracy | None
    """None without `evaluate`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHistory:
    """One virtual machine, from its start to its end."""

    rank: int
    """whose data it had: from 1"""
    newcomer: bool
    """it took the place of one that was killed"""
    killed: bool
    attacker: bool
    steps: int
    losses: tuple[tuple[int, float], ...]
    """(step, loss), as node.step(loss=) said it"""
    bytes_sent: int
    bytes_received: int
    exchanges: int
    """that it began and completed"""
    answered: int
    broken: int
    """exchanges that lost their connection and were resumed, or were given up"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningReport:
    """What simulate() returns. Equal arguments give equal reports, but for `wall_s`."""

    seed: int
    nodes: int
    strategy: str
    entries: int
    """numbers that the model has"""
    histories: tuple[NodeHistory, ...]
    looks: tuple[Look, ...]
    """the last one is of the weights at the end of each training"""
    weights: dict[str, Floats] = field(compare=False, repr=False)
    """the average of all replicas at the end, by the state dict's names"""
    digest: str
    """of the averaged weights and of all losses: equal for equal reports"""
    virtual_s: float
    wall_s: float = field(compare=False)

    @property
    def accuracy(self) -> Accuracy | None:
        """At the end."""
        return self.looks[-1].accuracy

    @property
    def drift(self) -> float:
        """At the end."""
        return self.looks[-1].drift

    @property
    def bytes_sent(self) -> float:
        """By a node, on average; machines that were replaced count with those that followed."""
        return sum(history.bytes_sent for history in self.histories) / self.nodes

    @property
    def transfers(self) -> float:
        """Models that a node sent, on average, a model being 4 bytes a number."""
        return self.bytes_sent / (4 * self.entries)

    @property
    def loss(self) -> float:
        """Mean over the last tenth of each node's losses; NaN where none was said."""
        last = [
            loss
            for history in self.histories
            if not history.killed and not history.attacker
            for _, loss in history.losses[-max(1, len(history.losses) // 10) :]
        ]
        return float(np.mean(last)) if last else float("nan")


def digest_of(weights: dict[str, Floats], histories: tuple[NodeHistory, ...]) -> str:
    """Of everything that was learned."""
    made = hashlib.sha256()
    for name, values in weights.items():
        made.update(name.encode() + np.ascontiguousarray(values).tobytes())
    made.update(repr(histories).encode())
    return made.hexdigest()[:32]
