"""A frozen view of a run, for whoever asks: what `mesh status`, the journal and the metrics read."""

from dataclasses import dataclass

from mesh.core.messages import NodeId
from mesh.counters import Counters
from mesh.history import Rates
from mesh.runs import Run, RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """One run on this node."""

    spec: RunSpec
    how: str | None
    step: int
    mesh_step: int
    loss: float | None
    samples: int
    partners: int
    drift: float | None
    norm: float
    last_exchange_s: float | None
    last_duration_s: float | None
    last_peer: NodeId | None
    counters: Counters
    every: int
    paused: bool
    rates: Rates


def run_statistics(run: Run, partners: int, now: float, rates: Rates) -> RunStatistics:
    """A frozen view of a run."""
    return RunStatistics(
        spec=run.spec,
        how=run.how.value if run.how else None,
        step=run.step,
        mesh_step=run.clock.shown,
        loss=run.loss,
        samples=run.samples,
        partners=partners,
        drift=run.drift(partners + 1),
        norm=run.replica.square_norm() ** 0.5,
        last_exchange_s=None if run.exchanged_at is None else now - run.exchanged_at,
        last_duration_s=run.last_duration_s,
        last_peer=run.last_peer,
        counters=run.counters,
        every=run.every or run.spec.every,
        paused=run.paused,
        rates=rates,
    )
