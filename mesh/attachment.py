"""Keeps a training attached to its machine's node: finds or starts one, notices its death, returns.

A life: Attachment() -> a node that runs, or one of our own -> `session` -> the node dies: one warning,
`session` is None and the training goes on alone -> again() at later boundaries -> close().
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from mesh.checkpoint import CheckpointInfo, kept_of
from mesh.client import LocalSocket, RunningNode, ask, node_of_state
from mesh.errors import MeshError, NodeNotRunning
from mesh.launch import NodeProcess, make_mesh_if_none, start_node
from mesh.session import LOCAL_S, Session, StepClock
from mesh.settings import NodeSettings
from mesh.tensors import Tensors

logger = logging.getLogger("mesh")

BEGIN_S: Final = 3600.0
"""A newcomer on slow Wi-Fi may take this long to get a large model; it is told of every minute."""

FIRST_RETRY_S: Final = 1.0
LAST_RETRY_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What JoinedNode.statistics() returns. Sizes are bytes, times seconds."""

    attached: bool
    """False: the node is gone and the training goes on alone"""
    step: int
    mesh_step: int
    """steps of the mesh: JoinedNode.mesh_step"""
    samples: int
    peers: int
    """peers that this run is averaged with now"""
    exchanges: int
    """exchanges that this node began and completed"""
    answered: int
    bytes_sent: int
    bytes_received: int
    drift: float | None
    """consensus distance: RMS distance of the replicas to their mean"""
    began: str | None
    """how the run got its first weights: alone, first, donor, again"""


class Attachment:
    """One training's tie to a node, through the deaths of either."""

    def __init__(
        self,
        tensors: Tensors,
        settings: NodeSettings,
        request: dict[str, Any],
        *,
        resumed: CheckpointInfo | None = None,
    ) -> None:
        """Attaches and waits for the first weights, which are in the model then. Raises MeshError.

        `request` is what the training says of itself to every node that it attaches to.
        `resumed`: what its checkpoint says, if it goes on from one.
        """
        self._tensors = tensors
        self._settings = settings
        self._request = request
        self._process: NodeProcess | None = None
        self._retry_at = 0.0
        self._retry_s = FIRST_RETRY_S
        self._begun = resumed is not None
        self._kept = None if resumed is None else kept_of(resumed, self.strategy, tensors.entries)
        self._met = resumed is not None and resumed.exchanged
        """other replicas have met this one: what it holds is the mesh's"""
        self.session: Session | None = None
        """None while the node is gone"""
        self.clock = StepClock()
        if resumed is not None:
            self.clock = StepClock(steps=resumed.mesh_step, counted=resumed.step)
        """the mesh clock; it goes on by itself while the node is gone"""
        self.began: str | None = None
        """how the run got its first weights"""
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> str:
        """Name of the run."""
        return str(self._request["run"])

    @property
    def strategy(self) -> str:
        """How the run is averaged."""
        return str(self._request["strategy"])

    @property
    def met(self) -> bool:
        """Whether other replicas have met this one."""
        return self._met or (self.session is not None and self.session.peers > 0)

    def statistics(self, step: int, mesh_step: int, samples: int) -> Statistics:
        """Of a training that came so far."""
        figures = self._figures()
        exchanges = figures.get("exchanges", {})
        return Statistics(
            attached=bool(figures),
            step=step,
            mesh_step=mesh_step,
            samples=samples,
            peers=figures.get("partners", 0),
            exchanges=exchanges.get("completed", 0),
            answered=exchanges.get("answered", 0),
            bytes_sent=figures.get("bytes_sent", 0),
            bytes_received=figures.get("bytes_received", 0),
            drift=figures.get("drift"),
            began=self.began,
        )

    def _figures(self) -> dict[str, Any]:
        """This run's part of `mesh status`; empty while the node is gone."""
        if self.session is None:
            return {}
        try:
            status = ask(node_of_state(self._settings.state), "status")
        except MeshError:
            return {}
        return next((run for run in status["runs"] if run["run"] == self.run), {})

    @contextlib.contextmanager
    def or_alone(self) -> Iterator[None]:
        """If the node is gone: say so once, and go on without it."""
        try:
            yield
        except NodeNotRunning as error:
            logger.warning(
                "%s: training goes on alone and attaches again when a node is up "
                "(`mesh up --state %s`)",
                error,
                self._settings.state,
            )
            self._drop()
            self._retry_s = FIRST_RETRY_S
            self._retry_at = time.monotonic() + self._retry_s

    def again(self, step: int) -> None:
        """Attaches to a node that is back, after `step` steps; at most a local moment, with a growing
        pause between."""
        if time.monotonic() < self._retry_at:
            return
        self.clock.posted(step)
        try:
            control = node_of_state(self._settings.state).control
            self._attach(LocalSocket(control, LOCAL_S), LOCAL_S)
        except MeshError:
            self._retry_s = min(LAST_RETRY_S, 2 * self._retry_s)
            self._retry_at = time.monotonic() + self._retry_s
        else:
            logger.warning("attached to the node again")

    def close(self) -> None:
        """Detaches, and ends the node if it was started for this training. Harmless twice."""
        try:
            if self.session is not None:
                with contextlib.suppress(MeshError):
                    self.session.detach()
        finally:
            self._drop()
            if self._process is not None:
                self._process.stop()
                self._process = None

    def now(self) -> float:
        """Seconds that pass for this training."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def stepped(self, loss: float | None) -> None:
        """A step of the training is over. A laboratory counts it, and lets virtual time pass."""

    def _begin(self) -> None:
        leaving: int | None = None
        while True:
            running = self._running_or_started(leaving)
            try:
                self._attach(LocalSocket(running.control, LOCAL_S), BEGIN_S)
                return
            except NodeNotRunning:
                # A node that ends with its last training has turned this one away. Ours has no reason to.
                if self._process is not None and self._process.is_own:
                    raise
                self._process, leaving = None, running.pid

    def _running_or_started(self, leaving: int | None) -> RunningNode:
        """A node that is up, but for the process `leaving`; else one that is started for this training."""
        with contextlib.suppress(NodeNotRunning):
            return node_of_state(self._settings.state, leaving)
        make_mesh_if_none(self._settings)
        self._process = start_node(self._settings, leaving)
        return self._process.running

    def _attach(self, link: LocalSocket, begin_s: float) -> None:
        session, how = Session.attach(
            link,
            {
                **self._request,
                "started": self._begun,
                "exchanged": self._met,
                "step": self.clock.counted,
                "clock": self.clock.steps,
                "resumes": self._kept is not None,
                "differences": self._tensors.takes_differences,
            },
            self._tensors.fill,
            begin_s,
            self.clock,
            self._kept,
        )
        self._kept = None
        if how == "donor":
            self._tensors.load(session.offered)
        else:  # an exchange may have come before the offer was written
            session.merge(self._tensors)
        session.posted[:] = session.offered
        self._met |= how == "donor"
        self._begun = True
        self.session, self.began = session, self.began or how

    def _drop(self) -> None:
        if self.session is not None:
            self._met = self.met
            self.session.close()
            self.session = None


ATTACH: Final[ContextVar[Callable[..., Attachment]]] = ContextVar("attach", default=Attachment)
"""What join() attaches with: in a laboratory (mesh/laboratory.py) to a virtual node of its own."""
