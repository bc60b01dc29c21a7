"""A laboratory's node: the deployed one, whose figures outlive its trainings, and which may lie.

Rule: an attacker keeps to the protocol and to the truth about its own weights; what it says of them
has the wrong sign, in what it sends, answers and gives to newcomers.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh.arrays import Floats
from mesh.codec import Codec
from mesh.core.strategies import fragment_entries
from mesh.counters import Counters
from mesh.node import Node
from mesh.replica import Replica, square_norm
from mesh.runs import Run, RunSpec, Tell


class FlippedReplica(Replica):
    """It believes w, and says -w. Of its own requests it believes no answer: they are about -w."""

    def as_it_lies(self, index: int, codec: Codec) -> None:
        """All that goes out passes write()."""

    def write(self, index: int, out: memoryview, codec: Codec) -> None:
        w = self.weights[self.slice_of(index)]
        np.negative(w, out=w)
        super().write(index, out, codec)
        np.negative(w, out=w)

    def answer(
        self,
        index: int,
        body: memoryview,
        share: float,
        reply: memoryview,
        codec: Codec,
        room: float = math.inf,
    ) -> float:
        w = self.weights[self.slice_of(index)]
        before = w.copy()
        step = codec.decode(body, np.empty_like(w), self._cut(index)) - before
        np.negative(w, out=w)
        distance = super().answer(index, body, share, reply, codec, room)
        length = square_norm(step)
        if length > room:
            step *= np.float32(math.sqrt(room / length))
        np.add(before, np.float32(share) * step, out=w)
        return distance

    def apply(
        self,
        index: int,
        body: memoryview,
        share: float,
        codec: Codec,
        check: Callable[[float], None] | None = None,
    ) -> float:
        w = self.weights[self.slice_of(index)]
        before = w.copy()
        distance = super().apply(index, body, share, codec)
        w[:] = before
        return distance


class LaboratoryNode(Node):
    """One virtual machine's node."""

    counters: list[Counters]
    """of every run that it ever had"""
    lies: bool

    def __init__(self, *, lies: bool, **about: Any) -> None:
        super().__init__(**about)
        self.counters, self.lies = [], lies

    async def attach(
        self,
        spec: RunSpec,
        posted: Floats,
        offered: Floats,
        tell: Tell,
        kept: Floats | None = None,
    ) -> Run:
        run = await super().attach(spec, posted, offered, tell, kept)
        self.counters.append(run.counters)
        return run

    def _make_replica(self, spec: RunSpec, entries: int) -> Replica:
        if not self.lies:
            return super()._make_replica(spec, entries)
        return FlippedReplica(entries, fragment_entries(spec.strategy, entries), spec.sizes)
