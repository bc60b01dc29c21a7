"""What a training keeps beside its averaged weights: the optimizer's momentum, and checkpoints.

A merge's trip: an offer is in the model -> merged() -> QuasiGlobalSGD learns how the mesh moved. A
step's: step() -> a checkpoint is due -> autosave.py. Rules: 1. Nothing of this is averaged: Adam's
moments, step counts and schedules stay local. 2. A merge after an absence (a resumed training, a node
that was gone) brings in all that the mesh did meanwhile, and says nothing of momentum.
"""

import logging
import os
from dataclasses import replace
from typing import Any

import torch

from mesh.autosave import Autosave
from mesh.checkpoint import Snapshot, snapshot
from mesh.errors import UsageError
from mesh.generations import generation_path, write_generation
from mesh.momentum import QuasiGlobalSGD
from mesh.plain_values import encode
from mesh.session import Session

logger = logging.getLogger("mesh")


class Keeper:
    """Model and optimizer of one training. `figures` are those of checkpoint.snapshot()."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        autosave: Autosave | None,
    ) -> None:
        """Brings back what a crash interrupted. Raises UsageError for a checkpoint that does not fit."""
        self._model = model
        self._optimizer = optimizer
        self._autosave = autosave
        self._anchored: Session | None = None
        """the session that the momentum has been counting in since its last anchor"""
        self._mixed_at = 0
        """the step after which the mesh last changed the model"""
        self._refused = False
        """what is to be saved cannot be, which was told"""
        if autosave is not None and optimizer is not None:
            encode(optimizer.state_dict(), "optimizer", {})  # now, and not after an hour
        self.resumed = autosave.resume(model, optimizer) if autosave is not None else None

    def attached(self, session: Session | None, step: int) -> None:
        """After this step the model holds its first weights, or those of the checkpoint."""
        if self.resumed is None and isinstance(self._optimizer, QuasiGlobalSGD):
            self._optimizer.anchor()
            self._anchored, self._mixed_at = session, step
        if self.resumed is not None:  # the node has it now; it is as long as two models
            self.resumed = replace(self.resumed, strategy_state={})

    def merged(self, session: Session, step: int) -> None:
        """An offer of this session has just been brought into the model, after this step."""
        if isinstance(self._optimizer, QuasiGlobalSGD):
            if self._anchored is session:
                self._optimizer.mixed(steps=step - self._mixed_at)
            else:
                self._optimizer.anchor()
            self._anchored, self._mixed_at = session, step

    def due(self, session: Session | None) -> bool:
        """Whether a checkpoint is to be written after this step.

        What the strategy keeps is in the training's hands between two hand-overs; that is waited for,
        but not for ever: the node may be stopped.
        """
        if self._autosave is None or not self._autosave.due():
            return False
        waits = session is not None and session.keeps and not session.holding
        return not waits or self._autosave.late()

    def step(self, **figures: Any) -> None:
        """Writes a checkpoint in the background: one is due."""
        assert self._autosave is not None
        self._autosave.start(self._snapshot(**figures))

    def save(self, path: str | os.PathLike[str], **figures: Any) -> None:
        """Writes a checkpoint and waits for the disk. Raises MeshError."""
        target = generation_path(path)
        write_generation(target, *snapshot(self._model, self._optimizer, **figures))

    def finish(self, **figures: Any) -> None:
        """Writes the last checkpoint of this training."""
        if self._autosave is not None:
            self._autosave.finish(self._snapshot(**figures))

    def _snapshot(self, **figures: Any) -> Snapshot | None:
        """None, told once, where something came up that cannot be saved: no reason to end a training."""
        try:
            return snapshot(self._model, self._optimizer, **figures)
        except UsageError as error:
            if not self._refused:
                logger.warning("no checkpoint: %s; the one before stays, training goes on", error)
            self._refused = True
            return None

    def close(self) -> None:
        """Waits for a checkpoint that is being written. Harmless twice."""
        if self._autosave is not None:
            self._autosave.finish(None)
