"""How a benchmark prints what it found: a table, then one JSON object; `--json`: that alone.

Rules: 1. A time is the median of its rounds. 2. A ratio is taken within a round, and its median
printed, so that what else the machine does meets both sides. 3. How busy the machine was is printed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

ROUNDS = 7
ROUNDS_QUICK = 2
ROUNDS_LEAST = 3
median = statistics.median


def bounded(rounds: int, seconds: float) -> Iterator[int]:
    """Numbers of rounds: after `seconds` no further one begins, but for the first three."""
    until = time.monotonic() + seconds
    for index in range(rounds):
        if index >= ROUNDS_LEAST and time.monotonic() > until:
            break
        yield index


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line: what was measured and what came out; `goal` is the most that is wanted."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    rounds: int = 1
    worst: float | None = None
    note: str = ""

    @property
    def kept(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal


def table(figures: Sequence[Figure]) -> str:
    """Aligned; a goal that was missed says so."""
    rows = [["", "median", "worst", "unit", "rounds", "goal", ""]]
    for figure in figures:
        goal = "" if figure.goal is None else f"<= {figure.goal:g}"
        verdict = {None: "", True: " kept", False: " MISSED"}[figure.kept]
        worst = "" if figure.worst is None else f"{figure.worst:.4g}"
        rounds = str(figure.rounds)
        value = f"{figure.value:.4g}"
        rows.append([figure.name, value, worst, figure.unit, rounds, goal + verdict, figure.note])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (1, 2, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--json", action="store_true", help="one JSON object, no table")
    made.add_argument("--quick", action="store_true", help="small models, few rounds: no figures")
    return made


def present(name: str, figures: Sequence[Figure], flags: argparse.Namespace, **more: Any) -> int:
    """Prints; 0 if every goal was kept, 1 if not. Small models in few rounds have no goals."""
    if flags.quick:
        figures = [replace(figure, goal=None) for figure in figures]
    report = {
        "schema": f"mesh.benchmark.{name}/1",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "figures": [{**asdict(figure), "kept": figure.kept} for figure in figures],
        **more,
    }
    if not flags.json:
        print(table(figures) + "\n")
    print(json.dumps(report))
    return 1 if any(figure.kept is False for figure in figures) else 0


def run(main: Callable[[], int]) -> None:
    """Ends as the shell expects it, after Ctrl-C as well."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
