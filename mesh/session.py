"""One attachment of a training to its node: the local socket, the shared buffers, whose turn it is.

The training holds both buffers from "begun" or "offered" to its next "post"; the node holds them in
between (replica.HandOver is its side of the same rule).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

from mesh.arrays import Floats
from mesh.client import LocalSocket
from mesh.errors import MeshError, NodeNotRunning, UsageError
from mesh.shared import HandOverMemory
from mesh.tensors import Tensors

logger = logging.getLogger("mesh")

LOCAL_S: Final = 2.0
"""A node on the same machine answers in a millisecond; beyond this it is stopped."""

EVALUATION_S: Final = 2.0
"""averaged() and close() wait this long for one exchange, so that what counts is the mesh's."""

REPORT_S: Final = 60.0
"""A newcomer on slow Wi-Fi hears this often that its first weights are still on their way, and a training
that a tensor of it is not finite."""


@dataclass(slots=True)
class StepClock:
    """The mesh clock as the training reads it: what the node said last, and its own steps since.

    It outlives sessions: while the node is gone it goes on with the training's own steps.
    """

    steps: float = 0.0
    """of the mesh, when the training had made `counted` steps of its own"""
    counted: int = 0

    def at(self, own: int) -> float:
        """The mesh clock, for a training that made `own` steps."""
        return self.steps + (own - self.counted)

    def posted(self, own: int) -> None:
        """The node counts these steps from now on: its next word holds them."""
        self.steps, self.counted = self.at(own), own


class Session:
    """Lives from an accepted attach to close(). Every method may raise NodeNotRunning."""

    def __init__(
        self, link: LocalSocket, memory: HandOverMemory, clock: StepClock, *, differences: bool
    ) -> None:
        self.link = link
        self.posted = memory.posted
        self.offered = memory.offered
        self._differences = differences
        """with an offer `posted` is what the model lacks: of a node that was asked for it, and can"""
        self._kept = memory.kept
        self._memory = memory
        self._clock = clock
        self.holding = True
        """the buffers are ours: from an offer to the next post"""
        self.fresh = False
        """the offer in hand is not in the model yet"""
        self.shown = False
        """within averaged(): the model holds the offer for a while"""
        self.peers = 0
        """peers that the run could be averaged with at the last offer"""
        self.every: int | None = None
        """steps between hand-overs, where `mesh set every=` changed it"""
        self._wanted = False
        self._meets = 0
        self._lost = "", 0.0
        """the tensor that was last said not to be finite, and when"""

    @classmethod
    def attach(
        cls,
        link: LocalSocket,
        request: dict[str, Any],
        fill: Callable[[Floats], None],
        begin_s: float,
        clock: StepClock,
        kept: Floats | None = None,
    ) -> tuple[Self, str]:
        """Attaches to the node behind `link`; waits at most begin_s for the run's first weights.

        `fill` writes the training's own weights, `clock` is kept up to date, `kept` is what a checkpoint
        holds of the strategy's. Returns the session, with the first weights in
        `offered`, and how they came: alone, first, donor or again. Raises MeshError.
        """
        session: Self | None = None
        try:
            answer = link.request(LOCAL_S, op="attach", **request)
            entries, vectors = int(answer["entries"]), int(answer["vectors"])
            memory = HandOverMemory(link.descriptors.pop(), entries, vectors)
            session = cls(link, memory, clock, differences=answer.get("differences") is True)
            fill(session.posted)
            if kept is not None and kept.shape == memory.kept.shape:
                memory.kept[:] = kept
            link.send(op="begin")
            return session, session._wait_for_begun(str(request["run"]), begin_s)
        except BaseException:
            if session is not None:
                session.close()
            link.close()
            raise

    def _wait_for_begun(self, run: str, begin_s: float) -> str:
        deadline = self.link.now() + begin_s
        while self.link.now() < deadline:
            event = self.link.receive(min(REPORT_S, begin_s)) or {}
            match event.get("event"):
                case None:
                    logger.warning("still waiting for the first weights of run %r", run)
                case "begun":
                    self._clock.steps = float(event["clock"])
                    _say_how(run, str(event["how"]), event.get("from"))
                    return str(event["how"])
                case "refused":
                    raise UsageError(str(event.get("reason")))
        raise MeshError(f"no first weights for run {run!r} within {begin_s:g} s")

    def strategy_state(self) -> Floats | None:
        """What the strategy keeps, to go with the model as it is now: (vectors, entries).

        None while the node holds the buffers, and where it keeps nothing.
        """
        if not self.holding or not len(self._kept):
            return None
        kept = self._kept.copy()
        if self.fresh and not self.shown:
            # The model lacks what the offer brings: the anchor goes back by as much.
            kept[0] -= self.posted if self._differences else self.offered - self.posted
        return kept

    @property
    def keeps(self) -> bool:
        """Whether checkpoints hold a state of the strategy's."""
        return len(self._kept) > 0

    def hears(self) -> bool:
        """Whether take_events() would find something now: asked at each step, it costs a microsecond."""
        return not self.holding and self.link.waits()

    def take_events(self, timeout_s: float) -> bool:
        """Reads what the node said; waits at most timeout_s for an offer. True if one is in hand."""
        deadline = self.link.now() + timeout_s
        while not self.holding:
            event = self.link.receive(max(0.0, deadline - self.link.now()))
            if event is None:
                break
            match event.get("event"):
                case "offered" if event["meets"] == self._meets:
                    self.holding, self.fresh, self._wanted = True, True, False
                    self.peers = int(event["peers"])
                    self._clock.steps = float(event["clock"])
                    self.every = event.get("every")
                case "diverged":
                    self._say_lost(str(event.get("tensor", "a tensor")), event.get("step"))
        return self.holding

    def _say_lost(self, tensor: str, step: object) -> None:
        """Once a minute: a statistic may hold a NaN for ever."""
        last, at = self._lost
        if tensor == last and self.link.now() < at + REPORT_S:
            return
        self._lost = tensor, self.link.now()
        logger.warning(
            "%s is not finite at step %s: numbers that are NaN, infinite or beyond 1e16 are not shared, "
            "all others are; where it is a weight, lower the learning rate",
            tensor,
            step,
        )

    def wait_for_offer(self) -> None:
        """For one after an exchange; without that, for one as things are. Raises NodeNotRunning."""
        if not self.take_events(EVALUATION_S):
            self.want()
            if not self.take_events(LOCAL_S):
                raise NodeNotRunning("the node does not answer")

    def merge(self, tensors: Tensors) -> None:
        """Brings the offer in hand into the model."""
        if self._differences:
            tensors.add(self.posted)
        else:
            tensors.merge(self.posted, self.offered)
        self.fresh = False

    def want(self) -> None:
        """Asks for an offer, once."""
        if not self.holding and not self._wanted:
            self.link.send(op="want")
            self._wanted = True

    def meet(self) -> None:
        """Gives an offer in hand back unused, and asks for one after the next exchange."""
        self.holding = self.fresh = False
        self._meets += 1
        self._wanted = False  # what answers it is void: it may have to be asked for again
        self.link.send(op="meet")

    def post(self, *, step: int, want: bool, **figures: Any) -> None:
        """The buffers go to the node; `want` asks for them back at once."""
        self.holding = self.fresh = False
        self._wanted = want
        self._clock.posted(step)
        self.link.send(op="post", step=step, want=want, **figures)

    def detach(self) -> None:
        """Ends the attachment politely; waits until the node has dropped the run."""
        self.link.send(op="detach")
        deadline = self.link.now() + LOCAL_S
        while self.link.now() < deadline:
            event = self.link.receive(LOCAL_S)
            if event is None or event.get("event") == "detached":
                break

    def close(self) -> None:
        self.link.close()
        self._memory.close()


def _say_how(run: str, how: str, donor: str | None) -> None:
    match how:
        case "alone":
            logger.warning(
                "nobody else trains run %r yet: starting alone; others join by themselves", run
            )
        case "donor":
            logger.info("run %r begins with the weights of %s", run, donor)
        case _:
            logger.info("run %r begins (%s)", run, how)
