"""Keeps a training attached to its machine's node: finds or starts one, notices its death, returns.

A life: Attachment() -> a node that runs, or one of our own -> `session` -> the node dies: one warning,
`session` is None and the training goes on alone -> again() at later boundaries -> close().
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, Final

from mesh.client import ask, node_of_state
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


class Attachment:
    """One training's tie to a node, through the deaths of either."""

    def __init__(
        self,
        tensors: Tensors,
        settings: NodeSettings,
        request: dict[str, Any],
        clock: StepClock | None = None,
    ) -> None:
        """Attaches and waits for the first weights, which are in the model then. Raises MeshError.

        `request` is what the training says of itself to every node that it attaches to; `clock` that
        of a training that was saved and goes on.
        """
        self._tensors = tensors
        self._settings = settings
        self._request = request
        self._process: NodeProcess | None = None
        self._retry_at = 0.0
        self._retry_s = FIRST_RETRY_S
        self._met = False
        """other replicas have met this one: what it holds is the mesh's"""
        self.session: Session | None = None
        """None while the node is gone"""
        self.clock = clock or StepClock()
        """the mesh clock; it goes on by itself while the node is gone"""
        self.began: str | None = None
        """how the run got its first weights"""
        try:
            try:
                running = node_of_state(settings.state)
            except NodeNotRunning:
                make_mesh_if_none(settings)
                self._process = start_node(settings)
                running = self._process.running
            self._attach(running.control, BEGIN_S)
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> str:
        """Name of the run."""
        return str(self._request["run"])

    def figures(self) -> dict[str, Any]:
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
            self._attach(node_of_state(self._settings.state).control, LOCAL_S)
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

    def _attach(self, control: str, begin_s: float) -> None:
        before = self.began is not None
        session, how = Session.attach(
            control,
            {
                **self._request,
                "started": before,
                "exchanged": self._met,
                "step": self.clock.counted,
                "clock": self.clock.steps,
            },
            self._tensors.fill,
            begin_s,
            self.clock,
        )
        if how == "donor":
            self._tensors.load(session.offered)
        session.posted[:] = session.offered
        self._met |= how == "donor"
        self.session, self.began = session, self.began or how

    def _drop(self) -> None:
        if self.session is not None:
            self._met |= self.session.peers > 0
            self.session.close()
            self.session = None
