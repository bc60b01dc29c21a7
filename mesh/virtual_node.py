"""A laboratory's node: the deployed one, whose figures outlive its trainings, and which may lie.

Rule: an attacker keeps to the protocol and to the truth about its own weights; what it says of them
has the wrong sign, in what it sends, answers and gives to newcomers.
"""

from typing import Any

import numpy as np

from mesh.codec import Codec, Floats
from mesh.node import Node
from mesh.replica import Replica
from mesh.runs import Counters, Run, RunSpec, Tell


class FlippedReplica(Replica):
    """It believes w, and says -w."""

    def write(self, index: int, out: memoryview, codec: Codec) -> None:
        w = self.weights[self.slice_of(index)]
        np.negative(w, out=w)
        super().write(index, out, codec)
        np.negative(w, out=w)

    def answer(
        self, index: int, body: memoryview, share: float, reply: memoryview, codec: Codec
    ) -> float:
        w = self.weights[self.slice_of(index)]
        before = w.copy()
        np.negative(w, out=w)
        distance = super().answer(index, body, share, reply, codec)
        # -w moved by share * (x + w); what is believed moves by share * (x - w).
        w += np.float32(2 - 2 * share) * before
        return distance

    def apply(self, index: int, body: memoryview, share: float, codec: Codec) -> float:
        # The peer says -w - w_j; what is believed moves by share * (w_j - w).
        w = self.weights[self.slice_of(index)]
        before = w.copy()
        distance = super().apply(index, body, share, codec)
        w -= np.float32(2 * share) * before
        return distance


class LaboratoryNode(Node):
    """One virtual machine's node."""

    counters: list[Counters]
    """of every run that it ever had"""
    lies: bool

    def __init__(self, *, lies: bool, **about: Any) -> None:
        super().__init__(**about)
        self.counters, self.lies = [], lies

    async def attach(self, spec: RunSpec, posted: Floats, offered: Floats, tell: Tell) -> Run:
        run = await super().attach(spec, posted, offered, tell)
        self.counters.append(run.counters)
        return run

    def _make_replica(self, entries: int) -> Replica:
        return FlippedReplica(entries) if self.lies else super()._make_replica(entries)
