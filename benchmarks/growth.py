"""What averaging costs as a mesh grows: gossip beside a ring all-reduce and a parameter server.

    python -m benchmarks.growth [--quick] [--json] [--plot docs/growth.svg] [--seconds 100]

Simulated machines, one network card each (growing_meshes.py); all but the CPU time is virtual and equal
for equal seeds, so each size is lived once. A round of gossip: every machine began one exchange; of ring
and server: the whole average. "noise": until what every machine knew alone has shrunk to 1 %; "news":
until what one machine knew alone is within 1 % at all others. Each way gets its part of --seconds and
goes as far as that lasts, at most to 1024 machines; the CPU time is Python's, simulated network included.
"""

import argparse
import time
from collections.abc import Awaitable, Callable, Sequence
from math import log
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.figures import Figure, parser, present, run
from benchmarks.growing_meshes import MODEL_BYTES, STAGES, Cost, gossip, ring, server
from mesh.virtual_time import run_seeded

Way = Callable[[Random, int], Awaitable[dict[str, Cost]]]

WAYS: dict[str, tuple[Way, float, float]] = {
    "server": (server, 0.1, 2.5),
    "ring": (ring, 0.2, 4.5),
    "gossip": (gossip, 0.7, 2.4),
}
"""Each with its part of the time, and how much longer it takes at twice the size: a ring sends n * n
pieces."""

SIZES = tuple(2**k for k in range(1, 11))
SIZES_QUICK = (2, 4)
SEED = 1
Row = dict[str, Any]


def measure(sizes: Sequence[int], seconds: float) -> list[Row]:
    """A row for each way, size and stage."""
    rows = []
    for name, (way, part, grows) in WAYS.items():
        began = time.monotonic()
        for count in sizes:
            size_began = time.monotonic()
            costs = run_seeded(way, SEED, count)
            rows += [_row(name, count, stage, costs[stage]) for stage in STAGES if stage in costs]
            now = time.monotonic()
            if grows * (now - size_began) > part * seconds - (now - began):
                break
    return rows


def _row(name: str, count: int, stage: str, cost: Cost) -> Row:
    return {
        "way": name,
        "machines": count,
        "stage": stage,
        "rounds": cost.rounds,
        "seconds": cost.seconds,
        "models_each": cost.bytes_each / MODEL_BYTES,
        "models_busiest": cost.bytes_busiest / MODEL_BYTES,
        "cpu_ms_each": 1000 * cost.cpu_s_each,
    }


def table(rows: Sequence[Row]) -> str:
    """Bytes as models that a machine sent and received."""
    heads = list(rows[0])
    lines = [heads] + [
        [f"{row[h]:.4g}" if isinstance(row[h], float) else str(row[h]) for h in heads]
        for row in rows
    ]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Needs the extra `plots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Equal figures give an equal file: no date, no random names in it.
    matplotlib.rcParams["svg.hashsalt"] = "gossipmesh"
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as letters: a fifth of the size
    panels = {
        "models_busiest": "models through the busiest card",
        "models_each": "models through the median card",
        "seconds": "virtual seconds",
        "cpu_ms_each": "CPU of a machine, ms (simulated)",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    curves = [("gossip", stage, f"gossip: {stage}") for stage in STAGES]
    curves += [("ring", "round", "ring"), ("server", "round", "server")]
    for (key, label), panel in zip(panels.items(), axes, strict=True):
        for way, stage, name in curves:
            chosen = [row for row in rows if (row["way"], row["stage"]) == (way, stage)]
            panel.loglog(
                [row["machines"] for row in chosen], [row[key] for row in chosen], "o-", label=name
            )
        panel.set(xlabel="machines", title=label)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def growth_figures(rows: Sequence[Row]) -> list[Figure]:
    """The growth of each way from 16 machines on, as an exponent of their number: 0 is flat, 1 linear."""
    found = []
    for way in WAYS:
        for key in ("seconds", "models_busiest"):
            mine = [row for row in rows if row["way"] == way and row["stage"] == "noise"]
            if len(mine) < 2:
                continue
            first = next((row for row in mine if row["machines"] >= 16), mine[0])
            last = mine[-1]
            if first is last:
                first = mine[0]
            exponent = log(last[key] / first[key]) / log(last["machines"] / first["machines"])
            span = f"{first['machines']} to {last['machines']} machines"
            found.append(
                Figure(name=f"{way}: {key} grow as n to the", value=exponent, unit="", note=span)
            )
    return found


def main() -> int:
    made = parser("growth", "what averaging costs as a mesh grows")
    made.add_argument("--plot", type=Path, metavar="SVG", help="draws the curves (extra `plots`)")
    made.add_argument("--seconds", type=float, default=100.0, help="of work (default 100)")
    flags: argparse.Namespace = made.parse_args()
    rows = measure(SIZES_QUICK if flags.quick else SIZES, flags.seconds)
    if not flags.json:
        print(table(rows) + "\n")
    if flags.plot:
        plot(rows, flags.plot)
    return present("growth", growth_figures(rows), flags, model_bytes=MODEL_BYTES, rows=rows)


if __name__ == "__main__":
    run(main)
