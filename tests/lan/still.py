"""A training that makes no progress: whatever moves its weights is the mesh's doing.

It attaches to a machine's node from the test process (a local socket's path leads into every
namespace) with one number everywhere. So every fragment of every replica holds one number for ever,
the same operations having been done to each of its entries, and the sum over the nodes of each
fragment is a constant that must hold. A life: StillTraining() -> post() asks for one exchange ->
look() reads the replica -> close(). With a dead node turn() attaches again, with the weights it has.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

import mesh
from mesh.core.messages import FRAGMENT_ENTRIES
from mesh.errors import MeshError
from tests.helpers import NumpyTraining
from tests.lan.findings import Findings
from tests.lan.lab import Machine

OFFER_S: Final = 2.0
"""A node answers its training in a millisecond; on a busy machine its turn may come late."""

AGREED: Final = 0.01
"""Replicas this close were read while they hardly moved, so their mean is known this well. What a
fault could do wrong to a fragment moves it by far more: the values that trainings hold are 1 apart."""

Means = np.ndarray


class StillTraining:
    """One of them. `means` is what it last saw: one number for each fragment of the replica."""

    def __init__(
        self, machine: Machine, value: float, *, run: str, entries: int = FRAGMENT_ENTRIES
    ) -> None:
        """Raises MeshError if no node runs there."""
        self.machine = machine
        self.run = run
        self.even = True
        """every fragment held one number only, each time that it was looked at"""
        self._steps = 0
        self._link: NumpyTraining | None = None
        self._values = np.full(entries, value, dtype=np.float32)
        self._holding = False
        self.means: Means = self._read(self._values)
        self._attach()

    def post(self) -> None:
        """Hands over no progress at all, which makes an exchange due. Raises MeshError."""
        assert self._link is not None
        if not self._holding:
            self.look()
        self._steps += 1
        np.copyto(self._link.memory.posted, self._link.memory.offered)
        self._link.link.send(
            op="post", want=False, waits=False, step=self._steps, samples=0, loss=None
        )
        self._holding = False

    def look(self) -> Means:
        """The replica as it is now. Raises MeshError. (Right after another look: as it was then.)"""
        assert self._link is not None
        if not self._holding:
            self._link.link.send(op="want")
            answer = self._link.link.receive(OFFER_S)
            if answer is None or answer.get("event") != "offered":
                raise MeshError(f"no offer but {answer}")
            self._holding = True
            np.copyto(self._values, self._link.memory.offered)
            self.means = self._read(self._values)
        return self.means

    def fresh(self) -> Means:
        """The replica as it is now, also where it was looked at before. Raises MeshError."""
        self.post()
        return self.look()

    def turn(self) -> None:
        """Looks, and makes an exchange due; attaches again where the node died and is back."""
        with contextlib.suppress(MeshError):
            if self._link is None:
                self._attach()
            self.look()
            self.post()
            return
        self.close()

    def figures(self) -> dict[str, Any]:
        """This run's part of `mesh status`; empty while no node answers."""
        runs = self.machine.status().get("runs", [])
        return next((run for run in runs if run["run"] == self.run), {})

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _attach(self) -> None:
        node = mesh.find_node(str(self.machine.state))
        self._link = NumpyTraining(node, self._values, self.run)
        self._holding = True

    def _read(self, values: np.ndarray) -> Means:
        starts = range(0, len(values), FRAGMENT_ENTRIES)
        parts = [values[start : start + FRAGMENT_ENTRIES] for start in starts]
        self.even &= all(part.min() == part.max() for part in parts)
        return np.array([part[0] for part in parts], dtype=np.float64)


def turn(trainings: Sequence[StillTraining]) -> None:
    """One exchange due at each of them."""
    for training in trainings:
        training.turn()


def spread(trainings: Sequence[StillTraining]) -> float:
    """How far apart their replicas were when they were last looked at."""
    return float(np.ptp([training.means for training in trainings], axis=0).max())


def agree(trainings: Sequence[StillTraining]) -> bool:
    """Whether all replicas are one by now; makes an exchange due at each."""
    turn(trainings)
    return spread(trainings) < AGREED


def compare(
    findings: Findings, what: str, trainings: Sequence[StillTraining], mean: Means | float
) -> None:
    """That replicas which agree hold the mean that had to stay, in every entry of every fragment."""
    off = max(float(np.abs(training.means - mean).max()) for training in trainings)
    torn = [training.machine.name for training in trainings if not training.even]
    findings.check(
        what,
        off <= 2 * AGREED and not torn,
        f"off by {off:.4f}" + (f", torn at {', '.join(torn)}" if torn else ""),
        f"off by at most {2 * AGREED:g}",
        size=off,
    )


def exchanges(trainings: Sequence[StillTraining], *kinds: str) -> int:
    """How many exchanges of these kinds (completed, resumed, ...) their nodes counted."""
    figures = [training.figures().get("exchanges", {}) for training in trainings]
    return sum(found.get(kind, 0) for found in figures for kind in kinds)
