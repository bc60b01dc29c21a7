"""join(): the torch side, in the training process. With tensors.py the only torch of mesh/.

The training holds an offer (two shared buffers `posted` and `offered`) from "begun" or "offered" to
its next "post"; the node holds them in between. A boundary, every H steps, reads:

    x += offered - posted; posted = x        what the mesh learned since our last post comes in
    post                                     what we learned goes out; the node merges and exchanges

Rules: 1. step() never waits for the network; only `patience` and averaged() wait, bounded. 2. If the
node dies, the training goes on alone and attaches again. 3. The model is changed in place, at step
boundaries only, never its integer and bool buffers.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from mesh.attachment import ATTACH, Attachment
from mesh.codec import EXACT, check_codec
from mesh.core.strategies import PAIR, check_strategy, usual_every
from mesh.errors import MeshError, NodeNotRunning, PeersMissing, UsageError
from mesh.session import LOCAL_S, Session
from mesh.settings import NodeSettings
from mesh.tensors import Tensors
from mesh.uninterrupted import uninterrupted

EVALUATION_S: Final = 2.0
"""averaged() and close() wait this long for one exchange, so that what counts is the mesh's."""

POLL_S: Final = 0.05
NUMBER_LIMIT: Final = 1e6
"""Of seconds and weights: a wait of eleven days is none, and samples can be counted in thousands."""


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
    state: str | os.PathLike[str] | None = None,
    settings: NodeSettings | None = None,
) -> "JoinedNode":
    """Attaches this training to the machine's node, or starts one for its lifetime.

    Returns when the model holds its first weights: those of the mesh where somebody trains `run`
    already, its own after `sync_timeout` seconds where nobody does. Use as a context manager, then
    call step() after each optimizer step.

    model: what is averaged: every floating-point entry of its state dict (float16, bfloat16, float32,
        float64), tied weights once; integer and bool buffers stay local.
    optimizer: checked to hold this model's parameters; its own state stays local.
    run: name of the training; machines of one run with equal layers average. Default: the script's.
    strategy: how replicas are averaged: "pair"; "exact" for few, steady nodes; "cyclic" a part at a
        time; "outer" for slow networks; "clip" where nodes may lie. docs/strategies.md compares them.
        All nodes of a run have the same.
    every: steps between hand-overs; smaller for small batches and uneven data. Default 8; 50 for
        "outer".
    weight: this node's part in the average (FedAvg: its number of samples).
    patience: seconds that a hand-over may wait for its exchange; 0 never waits.
    codec: how this node writes numbers in the exchanges it begins: "f32" exactly; "bf16" in half the
        bytes; "int8" in a quarter of them, rounded by chance. Nodes of one run may differ.
    state, settings: which node; default $MESH_STATE, else the user's own.

    Raises UsageError (what to change is in the message) or MeshError.
    """
    if not run:
        run = Path(sys.argv[0] or "default").stem[:64] or "default"
    if every is None:
        every = usual_every(strategy)
    if type(every) is not int or every < 1:
        raise UsageError(f"every={every!r}: a whole number of steps from 1")
    for name, value in (("weight", weight), ("patience", patience), ("sync_timeout", sync_timeout)):
        if not 0 <= value <= NUMBER_LIMIT:
            raise UsageError(f"{name}={value!r}: a number from 0 to {NUMBER_LIMIT:g}")
    if weight == 0:
        raise UsageError("weight=0: a replica without weight would never be heard")
    check_strategy(strategy, weight)
    tensors = Tensors(model)
    _check_optimizer(model, optimizer)
    if settings is None:
        settings = NodeSettings(state=Path(state)) if state is not None else NodeSettings()
    attachment = ATTACH.get()(
        tensors,
        settings,
        {
            "run": run,
            "schema": tensors.schema(),
            "weight": float(weight),
            "every": every,
            "codec": check_codec(codec),
            "strategy": strategy,
            "sync_timeout_s": float(sync_timeout),
            "pid": os.getpid(),
            "script": sys.argv[0] or "python",
        },
    )
    return JoinedNode(tensors, attachment, every=every, patience=patience)


def _check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held and not any(id(p) in held for p in model.parameters()):
        raise UsageError(
            "the optimizer holds none of this model's parameters: make it from model.parameters() "
            "after the model is final"
        )


class JoinedNode:
    """What join() returns: this training's place in the mesh. One thread at a time may use it."""

    def __init__(
        self, tensors: Tensors, attachment: Attachment, *, every: int, patience: float
    ) -> None:
        """Use join()."""
        self._tensors = tensors
        self._attachment = attachment
        self._every = every
        self._patience = patience
        self._closed = False
        self._steps = 0
        self._samples = 0
        self._loss: float | None = None

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
        return max(0, int(self._attachment.clock.at(self._steps)))

    def step(self, *, loss: float | None = None, samples: int | None = None) -> None:
        """Call after each optimizer step. Every H-th call hands over; none waits for the network.

        loss, samples: shown by `mesh status`; `samples` are this step's.
        Raises UsageError if the node was closed or the model changed its layers.
        """
        self._check_open()
        self._steps += 1
        self._samples += int(samples or 0)
        if loss is not None:
            self._loss = float(loss)
        self._attachment.stepped(loss)
        place = self._steps % self._every
        session = self._attachment.session
        if session is None:
            if place == 0:
                self._tensors.check()
                self._attachment.again(self._steps)
            return
        with self._attachment.or_alone():
            if place == 0:
                self._boundary(session)
            elif place == self._every - 1 and not self._patience:
                session.want()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model holds the mesh's weights; after it, exactly the training's.

            with node.averaged():
                evaluate(model)        # or save it

        Waits for one exchange, at most 2 s; not at all where there is nobody to average with. What
        was learned since the last hand-over is not in it. Do not train inside.
        """
        self._check_open()
        self._tensors.check()
        session = self._attachment.session
        with self._attachment.or_alone():
            if session is not None:
                with uninterrupted():
                    session.meet()
                _wait_for_offer(session)
        session = self._attachment.session
        if session is None:
            yield  # alone: the training's own weights are all there is
            return
        kept = self._tensors.copies()
        try:
            self._tensors.load(session.offered)
            yield
        finally:
            with uninterrupted():
                self._tensors.restore(kept)

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
        figures = self._attachment.figures()
        exchanges = figures.get("exchanges", {})
        return Statistics(
            attached=bool(figures),
            step=self._steps,
            mesh_step=self.mesh_step,
            samples=self._samples,
            peers=figures.get("partners", 0),
            exchanges=exchanges.get("completed", 0),
            answered=exchanges.get("answered", 0),
            bytes_sent=figures.get("bytes_sent", 0),
            bytes_received=figures.get("bytes_received", 0),
            drift=figures.get("drift"),
            began=self._attachment.began,
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
        self._close(hand_over=kind is None)

    # ------------------------------------------------------------------------------- hand-over

    def _boundary(self, session: Session) -> None:
        self._tensors.check()
        if not session.take_events(self._patience):
            session.want()
            return
        self._post(session, waits=self._patience > 0)
        if self._patience and session.take_events(self._patience):
            # It arrived before any step was made since the post: it is the model.
            with uninterrupted():
                self._tensors.merge(session.posted, session.offered)
                session.fresh = False

    def _post(self, session: Session, *, waits: bool) -> None:
        """Brings the offer in hand into the model, and the model's progress into `posted`."""
        loss = self._loss
        with uninterrupted():
            if session.fresh:
                self._tensors.merge(session.posted, session.offered)
            else:
                self._tensors.collect(session.posted)
            session.post(
                step=self._steps,
                samples=self._samples,
                loss=loss if loss is not None and math.isfinite(loss) else None,
                waits=waits,
                want=not waits and self._every == 1,
            )

    def _hand_over_last(self, session: Session) -> None:
        """The last progress, and one exchange that carries it to a peer."""
        self._tensors.check()
        session.want()
        if session.take_events(LOCAL_S):
            self._post(session, waits=True)
            _wait_for_offer(session)

    def _close(self, *, hand_over: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if hand_over and self._attachment.session is not None:
                with contextlib.suppress(MeshError):
                    self._hand_over_last(self._attachment.session)
        finally:
            self._attachment.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(
                f"run {self.run!r} is closed: step() and averaged() belong inside the `with` block"
            )


def _wait_for_offer(session: Session) -> None:
    """For an offer after one exchange; without it, for one as things are. Raises NodeNotRunning."""
    if not session.take_events(EVALUATION_S):
        session.want()
        if not session.take_events(LOCAL_S):
            raise NodeNotRunning("the node does not answer")
