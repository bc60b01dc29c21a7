"""What a training does at its steps to be averaged: hands its progress over, brings the mesh's in.

A boundary, every H steps, reads: post (what we learned goes out; the node merges it and exchanges). What
the exchange brought is in the model at the first step that finds it there:

    x += offered - posted

Rules: 1. The training holds both buffers from "begun" or "offered" to its next "post". 2. Only
`patience` and averaged() wait, bounded. 3. Ctrl-C waits for the end of a hand-over.
"""

import contextlib
import math
from dataclasses import dataclass

from mesh.attachment import Attachment
from mesh.errors import MeshError
from mesh.keeper import Keeper
from mesh.session import LOCAL_S, Session
from mesh.tensors import Tensors
from mesh.uninterrupted import uninterrupted


@dataclass(slots=True)
class Progress:
    """How far a training came."""

    steps: int = 0
    samples: int = 0
    loss: float | None = None


class Boundaries:
    """Those of one training. Every method may raise UsageError if the model changed its layers."""

    def __init__(
        self,
        tensors: Tensors,
        attachment: Attachment,
        keeper: Keeper,
        progress: Progress,
        *,
        every: int,
        patience: float,
    ) -> None:
        self._tensors = tensors
        self._attachment = attachment
        self._keeper = keeper
        self._progress = progress
        self._every = every
        self._patience = patience

    def step(self) -> None:
        """A step of the training is over."""
        place = self._progress.steps % self._every
        session = self._attachment.session
        if session is None:
            if place == 0:
                self._tensors.check()
                self._attachment.again(self._progress.steps)
            return
        asks = place == self._every - 1 and not self._patience
        if place and not asks and not session.fresh and not session.hears():
            return  # most steps, so nothing is prepared for more
        with self._attachment.or_alone():
            if place == 0:
                self._boundary(session)
                return
            self._take_in(session)
            if asks:
                session.want()

    def meet(self, session: Session) -> None:
        """The next offer is the one after an exchange of what the model holds now, or held lately."""
        if session.holding and not session.fresh:
            self._post(session, waits=True)
        else:
            with uninterrupted():
                session.meet()

    def last(self) -> None:
        """The last progress, and one exchange that carries it to a peer."""
        session = self._attachment.session
        if session is None:
            return
        with contextlib.suppress(MeshError):
            self._tensors.check()
            session.want()
            if session.take_events(LOCAL_S):
                self._post(session, waits=True)
                session.wait_for_offer()

    def _take_in(self, session: Session) -> None:
        """Brings what the exchange brought into the model, at the first step that finds it there.

        At the next boundary it would be H steps old: replicas would train on from where they had been
        before they were averaged, and lie further apart.
        """
        if not session.fresh and not session.hears():
            return
        with uninterrupted():  # an offer that was read and not taken note of would be lost
            session.take_events(0.0)
            if session.fresh:
                self._tensors.check()
                self._merge(session)

    def _boundary(self, session: Session) -> None:
        self._tensors.check()
        if not session.take_events(self._patience):
            session.want()
            return
        self._every = session.every or self._every  # `mesh set every=`
        self._post(session, waits=self._patience > 0 or self._every > 1)
        if self._patience and session.take_events(self._patience):
            # It arrived before any step was made since the post: it is the model.
            with uninterrupted():
                self._merge(session)

    def _post(self, session: Session, *, waits: bool) -> None:
        """The model's progress goes into `posted`, and that to the node; an offer in hand comes first."""
        loss = self._progress.loss
        with uninterrupted():
            if session.fresh:
                self._merge(session)
            self._tensors.collect(session.posted)
            session.post(
                step=self._progress.steps,
                samples=self._progress.samples,
                loss=loss if loss is not None and math.isfinite(loss) else None,
                waits=waits,
                want=not waits and self._every == 1,
            )

    def _merge(self, session: Session) -> None:
        session.merge(self._tensors)
        self._keeper.merged(session, self._progress.steps)
