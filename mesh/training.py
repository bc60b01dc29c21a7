"""join(): the torch side, in the training process.

A step's trip: node.step() -> boundary.py: every H-th hands over what was learned, and one of those after
it brings in what the exchange brought -> keeper.py: a checkpoint, if one is due.

Rules: 1. step() never waits for the network; only `patience` and averaged() wait, bounded. 2. If the
node dies, the training goes on alone and attaches again. 3. The model is changed in place, at step
boundaries only, never its integer and bool buffers.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from mesh import batchnorm
from mesh.attachment import ATTACH, Attachment, Statistics
from mesh.autosave import Autosave
from mesh.boundary import Boundaries, Progress
from mesh.codec import EXACT, check_codec
from mesh.core.strategies import PAIR, check_strategy, usual_every
from mesh.errors import NodeNotRunning, PeersMissing, UsageError
from mesh.keeper import Keeper
from mesh.settings import NodeSettings
from mesh.tensors import Tensors, check_optimizer
from mesh.uninterrupted import uninterrupted

logger = logging.getLogger("mesh")

POLL_S: Final = 0.05
NUMBER_LIMIT: Final = 1e6
"""Of seconds and weights: a wait of eleven days is none, and samples can be counted in thousands."""


def join(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    run: str | None = None,
    strategy: str = PAIR,
    every: int | None = None,
    weight: float = 1.0,
    patience: float = 0.0,
    sync_timeout: float = 2.0,
    codec: str = EXACT,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    state: str | os.PathLike[str] | None = None,
    settings: NodeSettings | None = None,
) -> "JoinedNode":
    """Attaches this training to the machine's node, or starts one for its lifetime.

    Returns when the model holds its first weights: those of the mesh where somebody trains `run`, its
    own after `sync_timeout` s where nobody does. A context manager: step() after each optimizer step.

    model: what is averaged: every floating-point entry of its state dict, of any precision, tied
        weights once; integer and bool buffers stay local.
    optimizer: checked to hold this model's parameters; its own state stays local.
    run: name of the training; machines of one run with equal layers average. Default: the script's.
    strategy: how replicas are averaged, alike in all of a run: "pair"; "exact" for few, steady nodes;
        "cyclic" a part at a time; "outer" for slow networks; "clip" where nodes may lie.
    every: steps between hand-overs, by default 8 (50 for "outer"); fewer for small batches and
        uneven data.
    weight: this node's part in the average (FedAvg: its number of samples).
    patience: seconds that a hand-over may wait for its exchange; 0: never.
    codec: how numbers travel in the exchanges that this node begins: "f32" exactly; "bf16" in half
        the bytes; "int8" in a quarter, rounded by chance. Nodes of one run may differ.
    checkpoint: a directory; where it holds a checkpoint of the run, this training goes on from it: a
        script's loop begins at node.steps.
    checkpoint_every: seconds between two of them; close() writes the last.
    state, settings: which node; default $MESH_STATE, else the user's own.

    Raises UsageError (it says what to change) or MeshError.
    """
    run = run or Path(sys.argv[0] or "default").stem[:64] or "default"
    every = usual_every(strategy) if every is None else every
    check_strategy(strategy, weight)
    numbers = {"weight": weight, "patience": patience, "sync_timeout": sync_timeout}
    every = _check(run, every, {**numbers, "checkpoint_every": checkpoint_every})
    tensors = _tensors_of(model, optimizer)
    settings = settings or (NodeSettings(state=Path(state)) if state else NodeSettings())
    request = {
        "run": run,
        "schema": tensors.schema(),
        "weight": float(weight),
        "every": every,
        "codec": check_codec(codec),
        "strategy": strategy,
        "sync_timeout_s": float(sync_timeout),
        "pid": os.getpid(),
        "script": sys.argv[0] or "python",
        "keeps": checkpoint is not None,
    }
    autosave = None if checkpoint is None else Autosave(checkpoint, run, checkpoint_every)
    try:
        keeper = Keeper(model, optimizer, autosave)
        tensors.check_finite()
        attachment = ATTACH.get()(tensors, settings, request, resumed=keeper.resumed)
    except BaseException:
        if autosave:
            autosave.close()
        raise
    return JoinedNode(model, tensors, attachment, keeper, every=every, patience=patience)


def _tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Tensors:
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"join() takes the model, a torch.nn.Module, and not {_kind(model)}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise UsageError(
            f"join() takes one torch.optim.Optimizer, and not {_kind(optimizer)}; of several only one "
            "may be QuasiGlobalSGD or is to be in the checkpoint: name that one, or none"
        )
    tensors = Tensors(model)
    check_optimizer(model, optimizer)
    if tensors.has_batchnorm:
        logger.warning(batchnorm.ADVICE)
    return tensors


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _check(run: str, every: int, numbers: dict[str, float]) -> int:
    """`every`, which numpy may have made."""
    if not isinstance(run, str):
        raise UsageError(f"run={run!r}: a name, as text")
    if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
        raise UsageError(f"every={every!r}: a whole number of steps from 1")
    for name, value in numbers.items():
        if not isinstance(value, Real) or not 0 <= value <= NUMBER_LIMIT:
            raise UsageError(f"{name}={value!r}: a number from 0 to {NUMBER_LIMIT:g}")
    if numbers["weight"] == 0:
        raise UsageError("weight=0: a replica without weight would never be heard")
    return int(every)


class JoinedNode:
    """What join() returns: this training's place in the mesh. One thread at a time may use it."""

    def __init__(
        self,
        model: torch.nn.Module,
        tensors: Tensors,
        attachment: Attachment,
        keeper: Keeper,
        *,
        every: int,
        patience: float,
    ) -> None:
        """Use join()."""
        self._model = model
        self._tensors = tensors
        self._attachment = attachment
        self._keeper = keeper
        self._closed = False
        self._pid = os.getpid()
        self._shown = 0
        """averaged() blocks that are open"""
        self._progress = Progress()
        if keeper.resumed is not None:
            self._progress = Progress(keeper.resumed.step, keeper.resumed.samples)
        self._boundaries = Boundaries(
            tensors, attachment, keeper, self._progress, every=every, patience=patience
        )
        keeper.attached(attachment.session, self._progress.steps)

    # ------------------------------------------------------------------------------- interface

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._attachment.run

    @property
    def peers(self) -> int:
        """Peers that this run could be averaged with at the last hand-over; costs nothing to read.

        0 while the node is gone. statistics() asks the node for the number of this moment.
        """
        session = self._attachment.session
        return session.peers if session is not None else 0

    @property
    def mesh_step(self) -> int:
        """How far the mesh has come: the mean of its nodes' steps. Costs nothing to read.

        What a learning-rate schedule is to go by: a node that joins late begins where the mesh is.
        As of the last hand-over, plus this node's own steps since; so it may step back by a few where
        the others are slower. Alone it counts on from where it was.
        """
        return max(0, int(self._attachment.clock.at(self._progress.steps)))

    @property
    def steps(self) -> int:
        """Steps of this training, with those before it was resumed from a checkpoint."""
        return self._progress.steps

    def step(self, *, loss: float | None = None, samples: int | None = None) -> None:
        """Call after each optimizer step. Every H-th call hands over; none waits for the network.

        loss, samples: shown by `mesh status`; `samples` are this step's.
        Raises UsageError if the node was closed or the model changed its layers.
        """
        self._check_open()
        if self._shown:
            raise UsageError(
                "step() within averaged(): the model holds the mesh's weights there, and what is learned "
                "is undone; train outside of it"
            )
        self._progress.steps += 1
        self._progress.samples += int(samples or 0)
        if loss is not None:
            self._progress.loss = float(loss)
        self._attachment.stepped(loss)
        self._boundaries.step()
        if self._keeper.due(self._attachment.session):
            self._keeper.step(**self._figures())

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model holds the mesh's weights; after it, exactly the training's.

            with node.averaged():
                evaluate(model)        # or save it

        Waits for one exchange, at most 2 s; not at all where there is nobody to average with. Where
        the exchange before is still under way, what was learned since then is not in it. Do not train
        inside.
        """
        self._check_open()
        self._tensors.check()
        session = self._attachment.session
        with self._attachment.or_alone():
            if session is not None:
                self._boundaries.meet(session)
                session.wait_for_offer()
        session = (
            self._attachment.session
        )  # None: alone, the training's own weights are all there is
        kept = self._tensors.copies()
        self._shown += 1
        try:
            if session is not None:
                self._tensors.load(session.offered)
                session.shown = True
            yield
        finally:
            with uninterrupted():
                self._shown -= 1
                self._tensors.restore(kept)
                if session is not None:
                    session.shown = False

    def refresh_batchnorm(self, loader: Iterable[Any], batches: int = 100) -> None:
        """Running statistics of BatchNorm anew, from this node's data and the weights as they are.

            with node.averaged():
                node.refresh_batchnorm(loader)     # gone with the averaged weights after the block
                evaluate(model)

        loader: gives inputs, or lists whose first entry is the model's input; read up to `batches`.
        Outside averaged() the new statistics are the training's and go to the mesh as its progress.
        """
        batchnorm.refresh(self._model, loader, batches)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes model, optimizer and figures to `path`.json and the safetensors that it names.

        mesh.load(path, model, optimizer) brings them back. Within averaged() the model is the mesh's.
        Returns when both are safe on the disk; raises MeshError, and what `path` held stays.
        """
        self._keeper.save(path, **self._figures())

    def wait_for_peers(self, n: int = 1, timeout: float | None = None) -> bool:
        """Waits until this run is averaged with at least `n` peers; True.

        Raises PeersMissing (a TimeoutError) after `timeout` seconds, NodeNotRunning if alone.
        """
        self._check_open()
        deadline = math.inf if timeout is None else self._attachment.now() + timeout
        while (found := self.statistics().peers) < n:
            if self._attachment.now() >= deadline:
                raise PeersMissing(
                    f"{found} of {n} peers train run {self.run!r} after {timeout:g} s; "
                    "`mesh peers` shows who is there and why others are not"
                )
            if self._attachment.session is None:
                raise NodeNotRunning("the node is gone: `mesh up` starts one")
            self._attachment.sleep(POLL_S)
        return True

    def statistics(self) -> Statistics:
        """Figures of this run now; those of the mesh are 0 while the node is gone."""
        return self._attachment.statistics(
            self._progress.steps, self.mesh_step, self._progress.samples
        )

    def close(self) -> None:
        """Hands over the last progress, detaches, and stops the node if join() started it.

        The model keeps the training's own weights. Called by the `with` block's end; harmless twice.
        """
        self._close(hand_over=True)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(hand_over=kind is None or (isinstance(error, SystemExit) and not error.code))

    def _close(self, *, hand_over: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return  # a forked child's copy of the `with` block ends: the training is its parent's
        try:
            if hand_over:
                self._boundaries.last()
        finally:
            try:
                if hand_over:
                    self._keeper.finish(**self._figures())
            finally:
                self._keeper.close()
                self._attachment.close()

    def _figures(self) -> dict[str, Any]:
        """What a checkpoint says of this training."""
        session = self._attachment.session
        return {
            "run": self.run,
            "step": self._progress.steps,
            "mesh_step": self.mesh_step,
            "samples": self._progress.samples,
            "strategy": self._attachment.strategy,
            "exchanged": self._attachment.met,
            "strategy_state": None if session is None else session.strategy_state(),
        }

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"run {self.run!r} was joined by the process that forked this one: only that one may use it"
            )
        if self._closed:
            raise UsageError(
                f"run {self.run!r} is closed: step() and averaged() belong inside the `with` block"
            )
