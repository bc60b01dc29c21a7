"""`mesh sim`: lives of simulated meshes, one for each seed, on all cores.

A seed's trip: run() -> a worker process -> mesh.simulate_faults() -> its report -> one line of the
table, or the first failure: what was violated, the last lines of its trace, and the command that replays it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import mesh
from nodes import render, text

NODES_LIMIT: Final = 4096
SEEDS_LIMIT: Final = 10_000_000
TRACE_NODES: Final = 64
"""Larger meshes are not traced unless it is asked for: it would be a tenth of the time."""

REPORT_S: Final = 5.0
"""How often a pipe hears how far it is; a terminal is told at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to simulate."""

    seed: int
    seeds: int
    nodes: int
    seconds: float
    faults: bool
    trace: bool
    as_json: bool

    def command(self, seed: int) -> str:
        """The command that lives this seed again."""
        flags = "" if self.faults else " --no-faults"
        return f"mesh sim --seed {seed} --nodes {self.nodes} --seconds {self.seconds:g}{flags}"


def run(order: Order) -> int:
    """Simulates; returns the exit code: 0 if every seed passed. Raises MeshError."""
    if not 1 <= order.nodes <= NODES_LIMIT:
        raise mesh.UsageError(f"--nodes {order.nodes}: 1..{NODES_LIMIT}")
    if not 1 <= order.seeds <= SEEDS_LIMIT:
        raise mesh.UsageError(f"--seeds {order.seeds}: 1..{SEEDS_LIMIT}")
    if not 0 < order.seconds <= 86400:
        raise mesh.UsageError(f"--seconds {order.seconds:g}: more than 0, at most a day")
    began = time.monotonic()
    reports: list[mesh.SimulationReport] = []
    with render.live(["seeds", "passed", "left"]) as draw:
        said_at = 0.0
        for report in _reports(order):
            reports.append(report)
            if report.failure is not None:
                break
            now = time.monotonic()
            if sys.stderr.isatty() or now - said_at > REPORT_S:
                said_at = now
                left_s = (now - began) / len(reports) * (order.seeds - len(reports))
                row = [str(order.seeds), str(len(reports)), text.duration(left_s)]
                draw(f"{len(reports)} of {order.seeds} lives of {order.nodes} nodes", [row])
    wall_s = time.monotonic() - began
    failed = reports[-1] if reports[-1].failure is not None else None
    if order.as_json:
        print(json.dumps(_as_json(order, reports, wall_s)))
    else:
        print(_table(order, reports, wall_s))
        if failed is not None:
            print(_failure(order, failed), file=sys.stderr)
    return 0 if failed is None else 1


def _reports(order: Order) -> Iterator[mesh.SimulationReport]:
    """In the order of the seeds. However it ends, no worker stays."""
    orders = [replace(order, seed=order.seed + k) for k in range(order.seeds)]
    workers = min(os.cpu_count() or 1, order.seeds)
    if workers == 1:
        yield from map(live, orders)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:  # fmt: skip
        yield from pool.imap(live, orders)


def live(order: Order) -> mesh.SimulationReport:
    """One seed; runs in a worker."""
    return mesh.simulate_faults(
        order.seed,
        nodes=order.nodes,
        seconds=order.seconds,
        faults=order.faults,
        trace=order.trace or order.nodes <= TRACE_NODES,
        trace_to=print if order.trace else None,
    )


def _total(reports: list[mesh.SimulationReport]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report.happened)
    return dict(sorted(total.items()))


def _table(order: Order, reports: list[mesh.SimulationReport], wall_s: float) -> str:
    passed = [r for r in reports if r.failure is None]
    healed = sorted(report.healed_s for report in passed) or [0.0]
    rows = [
        ["seeds", f"{order.seed}..{reports[-1].seed}" if len(reports) > 1 else str(order.seed)],
        ["passed", f"{len(passed)} of {len(reports)}"],
        ["nodes", str(order.nodes)],
        ["virtual time", text.duration(sum(report.virtual_s for report in reports))],
        ["time", text.duration(wall_s)],
        ["healed after", f"{healed[len(healed) // 2]:.1f} s, at most {healed[-1]:.1f} s"],
        *([name, f"{count:,}"] for name, count in _total(reports).items()),
    ]
    if len(reports) == 1:
        rows.append(["digest", reports[0].digest])
    return text.table(rows)


def _failure(order: Order, report: mesh.SimulationReport) -> str:
    last = "\n".join(report.trace)
    return (
        f"{last}\n\nseed {report.seed} failed {report.virtual_s:.3f} s after its start: "
        f"{report.failure}\nreplay it with: {order.command(report.seed)}"
    )


def _as_json(order: Order, reports: list[mesh.SimulationReport], wall_s: float) -> dict[str, Any]:
    """`mesh.sim/1`."""
    return {
        "schema": "mesh.sim/1",
        "nodes": order.nodes,
        "seconds": order.seconds,
        "wall_s": round(wall_s, 3),
        "passed": sum(report.failure is None for report in reports),
        "happened": _total(reports),
        "seeds": [
            {
                "seed": report.seed,
                "digest": report.digest,
                "failure": report.failure,
                "virtual_s": round(report.virtual_s, 3),
                "healed_s": round(report.healed_s, 3),
                "wall_s": round(report.wall_s, 3),
            }
            for report in reports
        ],
        "replay": order.command(reports[-1].seed) if reports[-1].failure else None,
        "trace": list(reports[-1].trace) if reports[-1].failure else [],
    }
