"""Does a mesh learn as well as one place? Sixteen virtual machines and real digits, against goals.

    python -m benchmarks.learning                 the table: every row, both splits, three seeds
    python -m benchmarks.learning --only "pair"   rows whose name holds this
    python -m benchmarks.learning --tune          the rates again, for RATES in learning_rows.py
    python -m benchmarks.learning --seeds 8       more seeds: what of a difference is chance
    python -m benchmarks.learning --split iid     one of the splits
    python -m benchmarks.learning --quick         a minute: one seed, 200 steps, no goals

A job's trip: rows() -> one row, split and seed -> a process of its own core -> mesh.simulate() ->
Found -> the row's mean over the seeds -> how far it is below `one place` with the same samples.
Rules: 1. References are computed beside the rows, on the same samples. 2. A rate is chosen on one seed
by the averaged model's loss on all training data, never by what is tested; all rows and references
choose from the same CANDIDATES. 3. Transfers are what was sent on the simulated wire, first weights
included.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import Pool
from multiprocessing.queues import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import mesh
from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.learning_rows import CANDIDATES, ROWS, Climb, Row, missing, rate_of
from mesh.conditions import REFERENCES
from mesh.core.guard import Guard

NODES = 16
STEPS = 800
STEPS_QUICK = 200
BATCH = 16
SEEDS = (1, 2, 3)
HEADS = {"iid": "IID", "dirichlet": "Dirichlet 0.1"}
SPLITS = tuple(HEADS)
CONCENTRATION = 0.1
LEAST = BATCH
"""Samples that a machine has at least, or it could not fill one batch."""

TUNED_ON = 11
"""A seed that the table does not use."""

SPEEDS = tuple(10 ** (k / (NODES - 1)) for k in range(NODES))
"""The fastest machine is ten times as fast as the slowest."""


# ------------------------------------------------------------------------------------ the training


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training of one row."""

    row: Row
    split: str
    seed: int
    rate: float
    steps: int
    tunes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What came of a job. Accuracies in percent; of a job that tunes, losses, negative."""

    averaged: float
    mean: float
    worst: float
    drift: float
    transfers: float
    broken: int
    wall_s: float


def shares(labels: np.ndarray, split: str, seed: int) -> list[np.ndarray]:
    """Each machine's indices. Dirichlet: of each class a machine gets a part drawn for it."""
    rng = np.random.default_rng(seed)
    if split == "iid":
        return np.array_split(rng.permutation(len(labels)), NODES)
    while True:
        parts: list[list[int]] = [[] for _ in range(NODES)]
        for label in range(10):
            mine = rng.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(rng.dirichlet([CONCENTRATION] * NODES))[:-1] * len(mine)
            for part, given in zip(parts, np.split(mine, ends.astype(int)), strict=True):
                part.extend(given)
        if min(len(part) for part in parts) >= LEAST:
            return [np.array(part) for part in parts]


def train(job: Job) -> Found:
    """One job, in a process of its own core."""
    row = job.row
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    y, test_y = (torch.tensor(part) for part in split[2:])
    owned = [torch.tensor(part) for part in shares(split[2], job.split, job.seed)]
    loss_of = torch.nn.functional.cross_entropy

    def build(rank: int) -> tuple[Any, Any, Any]:
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )
        kind = mesh.QuasiGlobalSGD if row.momentum else torch.optim.SGD
        return model, kind(model.parameters(), lr=job.rate), loss_of

    def loader(rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mine = owned[rank - 1]
        while True:
            chosen = mine[torch.randint(len(mine), (BATCH,))]
            yield x[chosen], y[chosen]

    def accuracy(model: torch.nn.Module) -> float:
        return 100 * (model(test_x).argmax(1) == test_y).double().mean().item()

    def learned(model: torch.nn.Module) -> float:
        return -loss_of(model(x), y).item()

    with contextlib.nullcontext() if row.guard else mock.patch.object(Guard, "reach", _no_reach):
        report = mesh.simulate(
            build,
            loader,
            nodes=NODES,
            every=row.every,
            steps=job.steps,
            seed=job.seed,
            strategy=row.strategy,
            codec=row.codec,
            speeds=SPEEDS if row.speeds else None,
            loss_of_connections=row.lost,
            replaced=row.replaced,
            attackers=range(1, NODES + 1, NODES // row.attackers) if row.attackers else (),
            evaluate=learned if job.tunes else accuracy,
        )
    assert report.accuracy is not None
    return Found(
        **asdict(report.accuracy),
        drift=report.drift,
        transfers=report.transfers,
        broken=sum(history.broken for history in report.histories),
        wall_s=report.wall_s,
    )


def _no_reach(guard: Guard, progress: float, norm: float) -> float | None:
    """Of a node without its guard: an exchange may bring anything."""
    return None


def _begin(cores: "SimpleQueue[int]") -> None:
    """In a worker: the programs of a laboratory take turns, which is quickest on one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # not on a Mac
        os.sched_setaffinity(0, {cores.get()})


@contextlib.contextmanager
def workers(count: int) -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for core in range(count):
        cores.put(core)
    with context.Pool(count, initializer=_begin, initargs=(cores,)) as pool:
        yield pool


def all_of(jobs: list[Job], pool: Pool) -> dict[Job, Found]:
    """Says how far it is on standard error."""
    found = {}
    for job, one in zip(jobs, pool.imap(train, jobs), strict=True):
        found[job] = one
        print(
            f"{len(found):4} of {len(jobs)}  {job.row.name}, {job.split}, seed {job.seed}, "
            f"rate {job.rate:g}: {one.averaged:.4g} ({one.mean:.4g}, {one.worst:.4g})",
            file=sys.stderr,
            flush=True,
        )
    return found


# ------------------------------------------------------------------------------------ what is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row and a split: the mean over the seeds, with how far they lie apart."""

    row: str
    split: str
    rate: float
    seeds: int
    averaged: float
    apart: float
    mean: float
    worst: float
    drift: float
    transfers: float
    broken: float


def line_of(row: Row, split: str, rate: float, found: list[Found]) -> Line:
    def mean(of: Callable[[Found], float]) -> float:
        return statistics.fmean(map(of, found))

    averaged = [one.averaged for one in found]
    return Line(
        row=row.name,
        split=split,
        rate=rate,
        seeds=len(found),
        averaged=mean(lambda one: one.averaged),
        apart=statistics.stdev(averaged) if len(averaged) > 1 else 0.0,
        mean=mean(lambda one: one.mean),
        worst=mean(lambda one: one.worst),
        drift=mean(lambda one: one.drift),
        transfers=mean(lambda one: one.transfers),
        broken=mean(lambda one: one.broken),
    )


def table(lines: list[Line], skipped: dict[str, str]) -> str:
    """As docs/learning.md has it: averaged model, (mean node, worst node), transfers."""
    found = {(line.row, line.split): line for line in lines}
    splits = [split for split in SPLITS if any(line.split == split for line in lines)]
    text = [f"{'':42}  {'  '.join(f'{HEADS[split]:>26}' for split in splits)}  transfers"]
    for row in ROWS:
        if row.name in skipped:
            text.append(f"{row.name:42}  waits: {skipped[row.name]}")
        elif (row.name, splits[0]) in found:
            cells = [found[row.name, split] for split in splits]
            said = "  ".join(
                f"{c.averaged:6.2f} ±{c.apart:4.2f} ({c.mean:5.1f} {c.worst:5.1f})" for c in cells
            )
            text.append(f"{row.name:42}  {said}  {cells[0].transfers:9.1f}")
    return "\n".join(text)


def goals(lines: list[Line]) -> list[Figure]:
    """How far each row is below one place, against how far it may be."""
    found = {(line.row, line.split): line for line in lines}
    made = []
    for row in ROWS:
        for split, what, points in row.goals:
            line, place = found.get((row.name, split)), found.get((ROWS[0].name, split))
            if line is None or place is None:
                continue
            value = line.averaged if what == "averaged" else line.worst
            made.append(
                Figure(
                    name=f"{row.name}: {split}, {what} below one place",
                    value=round(place.averaged - value, 3),
                    unit="points",
                    goal=points,
                    rounds=line.seeds,
                )
            )
    return made


def tune(
    rows: list[Row], splits: Sequence[str], rates: list[float], steps: int, pool: Pool
) -> None:
    """Prints RATES. Each row and split climbs: to the next larger rate, or else the next smaller one,
    while the loss falls."""
    climbs = {
        (row, split): Climb(len(rates)) for row in rows if not row.tuned_as for split in splits
    }
    while asked := {key: at for key, climb in climbs.items() if (at := climb.asks()) is not None}:
        jobs = {
            key: Job(
                row=key[0], split=key[1], seed=TUNED_ON, rate=rates[at], steps=steps, tunes=True
            )
            for key, at in asked.items()
        }
        found = all_of(list(jobs.values()), pool)
        for key, at in asked.items():
            loss = -found[jobs[key]].averaged
            # A loss that is not a number is the worst.
            climbs[key].losses[at] = loss if math.isfinite(loss) else math.inf
    print("RATES: dict[tuple[str, str], float] = {")
    for (row, split), climb in climbs.items():
        said = " ".join(f"{rates[at]:g}:{loss:.4f}" for at, loss in sorted(climb.losses.items()))
        print(f'    ("{row.name}", "{split}"): {rates[climb.chosen]:g},  # {said}')
    print("}")


def main() -> int:
    parser = figures.parser("learning", "digits on 16 virtual machines, against one place")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=CANDIDATES, help="to choose from, with --tune"
    )
    parser.add_argument(
        "--seeds", type=int, default=len(SEEDS), help="how many, from 1; more say what is chance"
    )
    parser.add_argument("--split", choices=SPLITS, help="one of the two; default: both")
    parser.add_argument("--tune", action="store_true", help="choose the rates again")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="trainings at once; default: the cores",
    )
    flags = parser.parse_args()
    with workers(flags.jobs) as pool:
        return _run(flags, pool)


def _run(flags: argparse.Namespace, pool: Pool) -> int:
    skipped = {row.name: why for row in ROWS if (why := missing(row)) is not None}
    rows = [row for row in ROWS if row.name not in skipped]
    if flags.only:  # the references are needed by every row
        rows = [row for row in rows if flags.only in row.name or row.strategy in REFERENCES]
    if flags.quick:
        rows = [replace(row, goals=()) for row in rows if row.every > 1][:4]
    steps = STEPS_QUICK if flags.quick else STEPS
    splits = SPLITS if flags.split is None else (flags.split,)
    if flags.tune:
        chosen = [row for row in rows if flags.only in row.name]
        tune(chosen, splits, flags.rates, steps, pool)
        return 0
    seeds = SEEDS[:1] if flags.quick else range(1, flags.seeds + 1)
    jobs = [
        Job(row=row, split=split, seed=seed, rate=rate_of(row, split), steps=steps)
        for seed in seeds
        for row in rows
        for split in splits
    ]
    found = all_of(jobs, pool)
    lines = [
        line_of(row, split, rate, [found[job] for job in jobs if (job.row, job.split) == key])
        for row in rows
        for split in splits
        for key, rate in [((row, split), rate_of(row, split))]
    ]
    if not flags.json:
        print(table(lines, skipped) + "\n")
    said = {"rows": [asdict(line) for line in lines], "waits": skipped, "nodes": NODES}
    return figures.present("learning", goals(lines), flags, steps=steps, **said)


if __name__ == "__main__":
    figures.run(main)
