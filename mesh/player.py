"""A training that is played: what mesh/training.py does with torch, on plain numpy buffers.

A life: Player.attach() -> tell("begun") -> post() at each boundary -> the node dies: it trains alone
-> attach() to the node that is back, as a training that had begun. Rule: it holds x, and touches the
two hand-over buffers only in its turn.
"""

from collections import deque
from typing import Any, Final

import numpy as np

from mesh.arrays import Floats
from mesh.codec import EXACT
from mesh.core.messages import SchemaEntry
from mesh.core.strategies import PAIR
from mesh.node import Node
from mesh.runs import Run, RunSpec

RUN: Final = "toy"
EVENTS_KEPT: Final = 64


class Player:
    """One training, from one attachment to the next."""

    def __init__(
        self,
        x: Floats,
        *,
        weight: float = 1.0,
        sync_timeout_s: float = 2.0,
        run: str = RUN,
        codec: str = EXACT,
        strategy: str = PAIR,
        keeps: bool = False,
        differences: bool = False,
    ) -> None:
        self.x = x
        self.weight = weight
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.steps = 0
        """of its own, as of the next post"""
        self.loss: float | None = None
        self.samples = 0
        self.clock = 0.0
        """the mesh clock, as its node said it last"""
        self.began: str | None = None
        """how it got its first weights; stays through the deaths of its node"""
        self.begun: str | None = None
        """how it began in this attachment; None until it has"""
        self.node: Node | None = None
        self._name = run
        self._codec = codec
        self._strategy = strategy
        self._differences = differences
        self._sync_timeout_s = sync_timeout_s
        self.kept: Floats | None = np.zeros((2, len(x)), dtype=np.float32) if keeps else None
        """what its strategy keeps, as of the last offer"""
        self.resumes = False
        """it brings `kept` from a checkpoint"""
        self._met = False
        self._run: Run | None = None
        self.posted: Floats = x.copy()
        self.offered: Floats = np.full_like(x, np.nan)
        """before a node has written it nothing that can be taken for weights: a seed replays to the bit"""

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run

    @property
    def weights(self) -> Floats:
        """The replica's, as they are now."""
        return self.run.replica.weights

    @property
    def _lacking(self) -> Floats:
        """What the offer in hand adds to x."""
        return self.posted if self._differences else self.offered - self.posted

    async def attach(self, node: Node, shape: tuple[int, ...] = ()) -> None:
        """Attaches to a node, for the first time or after the last one died."""
        self.node, self.begun, self._run = node, None, None
        self.posted, self.offered = self.x.copy(), np.full_like(self.x, np.nan)
        spec = RunSpec(
            run=self._name,
            entries=(SchemaEntry(name="w", shape=shape or (len(self.x),), dtype="float32"),),
            weight=self.weight,
            every=1,
            sync_timeout_s=self._sync_timeout_s,
            pid=1,
            script="toy.py",
            started=self.began is not None,
            exchanged=self._met,
            codec=self._codec,
            strategy=self._strategy,
            keeps=self.kept is not None,
            resumes=self.resumes,
            differences=self._differences,
            step=self.steps,
            clock=self.clock,
        )

        def tell(event: dict[str, Any]) -> None:
            if self.node is node:  # one that died says nothing more
                self.hear(event)

        self._run = await node.attach(spec, self.posted, self.offered, tell, self.kept)

    def lost(self) -> None:
        """The node is gone: train alone."""
        self.node = self._run = None

    async def post(self, progress: "float | Floats" = 0.0, *, waits: bool = False) -> None:
        """One boundary, if an offer is in hand."""
        self.x += progress
        run, node = self.run, self.node
        if run.ours:
            return
        self.x += self._lacking
        self.posted[:] = self.x
        await run.post(step=self.steps, loss=self.loss, samples=self.samples)
        if node is not None and self.node is node:  # else it died meanwhile
            await node.posted(run, waits=waits)

    def hear(self, event: dict[str, Any]) -> None:
        """What the node says."""
        self.events.append(event)
        self.clock = event.get("clock", self.clock)
        match event["event"]:
            case "begun":
                self.begun = event["how"]
                self.began = self.began or self.begun
                if self.begun == "donor":
                    self.x[:] = self.offered
                    self._met = True
                else:  # an exchange may have come before the offer was written
                    self.x += self._lacking
                self.posted[:] = 0.0 if self._differences else self.offered  # nothing is lacking
            case "offered":
                self._met = event["peers"] > 0 or self._met
            case _:
                pass
