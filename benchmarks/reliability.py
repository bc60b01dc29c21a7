"""How long the failure detector takes, how often it is wrong and what it costs, in virtual time.

    python -m benchmarks.reliability [--quick] [--json] [--only NAME] [--jobs 2]

Whole deployed nodes over the simulated network (watched_mesh.py); equal seeds give equal figures, except
for CPU time. An experiment's trip: EXPERIMENTS -> its measure function, one seed after the other ->
figures -> a line of the table. Rules: 1. Nothing of the detector is re-implemented here; ablations.py
takes one part of it out at a time. 2. A figure comes with its number of
runs. 3. A percentile is one of the values measured (nearest rank).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from random import Random

import trio

from benchmarks.ablations import ABLATIONS, PARTS, WHOLE
from benchmarks.watched_mesh import Traffic, WatchedMesh, percentile, watched_mesh
from mesh.core.messages import NodeId, State
from mesh.net.simulated import Weather
from mesh.virtual_time import run_seeded

ROUNDS_BEFORE = 2.0
ROUNDS_BETWEEN = 0.5
"""Rounds of probes before the first cut of a mesh, and between two: the order of probes has to be that
of a mesh that has lived for a while. The victim of the cut before is back then, and spared."""

SILENT_GOALS_S = {5: 5.0, 32: 7.0, 100: 10.0}
KILLED_GOAL_S = 1.0
NEVER_S = 120.0
"""A death that is not known to all by then ends the benchmark."""

LOOK_S = 0.05
"""How exactly the end of a minority's search is measured."""

COST_S = 30.0
"""Virtual seconds over which messages are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: what was measured, how, how often, and what came out."""

    experiment: str
    setting: str
    runs: str
    figures: dict[str, float]
    goal: str = ""
    kept: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalls:
    """One node that is stopped again and again; `awake_s` is the mean of what lies between."""

    stalled_s: float
    awake_s: float
    nodes: int = 16
    loss: float = 0.05


SLOW = Stalls(stalled_s=3.0, awake_s=17.0)
"""A training or a backup that takes the machine for 3 s every 20 s."""

GASPING = Stalls(stalled_s=8.0, awake_s=0.1)
GASPING_IN_RAIN = Stalls(stalled_s=8.0, awake_s=0.1, loss=0.3)
"""Lifeguard's experiment: awake for moments only. Where a third of all packets is lost as well, what
clears a member often comes after the moment is over, and the suspicion runs out in the stall."""

GASPING_IN_RAIN_OF_FIVE = Stalls(stalled_s=8.0, awake_s=0.1, loss=0.3, nodes=5)
"""The same, small enough to take local health apart in, and for a test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """What was said about nodes that lived, in one run."""

    accused_healthy: int
    accused_slow: int
    dead_healthy: int
    dead_slow: int
    refuted: int


# ---------------------------------------------------------------------------------- measurements


def detection_s(
    seed: int, *, nodes: int, cuts: int, silent: bool, ablation: str = ""
) -> list[tuple[float, float]]:
    """(until the first, until all others list it as dead) for each of `cuts` victims in turn."""

    async def main(rng: Random) -> list[tuple[float, float]]:
        found = []
        async with watched_mesh(rng, nodes) as mesh:
            await mesh.live_rounds(ROUNDS_BEFORE)
            victim = None
            for _ in range(cuts):
                await mesh.live_rounds(ROUNDS_BETWEEN)
                victim = rng.choice(sorted(node for node in mesh.nodes if node != victim))
                began = trio.current_time()
                watch = mesh.end(victim, silent=silent)
                with trio.fail_after(NEVER_S):
                    await watch.complete.wait()
                times = watch.dead_at.values()
                found.append((min(times) - began, max(times) - began))
                mesh.start(victim)
                await mesh.settle()
        return found

    with ABLATIONS[ablation]():
        return run_seeded(main, seed)


def minority_s(seed: int, *, nodes: int, few: int) -> float:
    """From the cut until each of the few lists all of the many as dead."""

    async def main(rng: Random) -> float:
        async with watched_mesh(rng, nodes) as mesh:
            await mesh.live_rounds(ROUNDS_BEFORE)
            order = rng.sample(sorted(mesh.nodes), nodes)
            here, there = order[:few], order[few:]
            mesh.network.partition(frozenset(here), frozenset(there))
            began = trio.current_time()
            with trio.fail_after(2 * NEVER_S):
                while any(  # noqa: ASYNC110 (a state of many nodes has no one event)
                    mesh.nodes[a].table[b].state < State.DEAD for a in here for b in there
                ):
                    await trio.sleep(LOOK_S)
            return trio.current_time() - began

    return run_seeded(main, seed)


def blame(seed: int, *, stalls: Stalls, seconds: float, ablation: str = "") -> Blame:
    """What is said of the living while one of them is stopped again and again."""

    async def main(rng: Random) -> Blame:
        async with watched_mesh(rng, stalls.nodes) as mesh:
            mesh.network.weather = Weather(loss=stalls.loss)
            await mesh.live_rounds(ROUNDS_BEFORE)
            slow = min(mesh.nodes)
            before = sum(node.incarnation for node in mesh.nodes.values())
            mesh.accused.clear()
            mesh.declared.clear()
            with trio.move_on_after(seconds):
                await _stall(mesh, slow, stalls)
            after = sum(node.incarnation for node in mesh.nodes.values())
            return Blame(
                accused_healthy=sum(verdict.of != slow for verdict in mesh.accused),
                accused_slow=sum(verdict.of == slow for verdict in mesh.accused),
                dead_healthy=sum(verdict.of != slow for verdict in mesh.declared),
                dead_slow=sum(verdict.of == slow for verdict in mesh.declared),
                refuted=after - before,
            )

    with ABLATIONS[ablation]():
        return run_seeded(main, seed)


async def _stall(mesh: WatchedMesh, slow: NodeId, stalls: Stalls) -> None:
    while True:
        await trio.sleep(stalls.awake_s * mesh.rng.uniform(0.5, 1.5))
        mesh.network.stall(slow)
        await trio.sleep(stalls.stalled_s)
        mesh.network.resume(slow)


def cost(seed: int, *, nodes: int) -> dict[str, float]:
    """Of one node in one second, at rest; CPU of the pure core, and of node and network together."""

    async def main(rng: Random) -> dict[str, float]:
        async with watched_mesh(rng, nodes) as mesh:
            await mesh.live_rounds(1.0)
            for node in mesh.nodes.values():
                node.time_core()
            mesh.traffic = traffic = Traffic()
            await trio.sleep(COST_S)
            mesh.traffic = None
            began = time.process_time()
            await trio.sleep(COST_S)  # again, without what counting and timing cost
            cpu_s = time.process_time() - began
            each = nodes * COST_S
            return {
                "messages/s": traffic.messages / each,
                "bytes/s": traffic.bytes / each,
                "core ms/s": 1000 * traffic.core_s / each,
                "simulated node ms/s": 1000 * cpu_s / each,
                "connections": sum(n.round_s for n in mesh.nodes.values()) / nodes,
            }

    return run_seeded(main, seed)


# ----------------------------------------------------------------------------------- experiments


class Runs:
    """Performs measurements for many seeds, on `jobs` processes, and says how far they are."""

    def __init__(self, jobs: int, *, quick: bool) -> None:
        self.quick = quick
        self._jobs = jobs

    def of(self, measure: Callable, seeds: int, **settings) -> list:
        """Results by seed."""
        began = time.perf_counter()
        if self._jobs == 1 or seeds == 1:
            results = [measure(seed, **settings) for seed in range(seeds)]
        else:
            with ProcessPoolExecutor(self._jobs) as pool:
                futures = [pool.submit(measure, seed, **settings) for seed in range(seeds)]
                results = [future.result() for future in futures]
        said = " ".join(f"{key}={value}" for key, value in settings.items())
        took_s = time.perf_counter() - began
        print(f"{measure.__name__} {said}: {seeds} seeds, {took_s:.0f} s", file=sys.stderr)
        return results


def killed(runs: Runs) -> list[Line]:
    seeds, cuts = (2, 10) if runs.quick else (8, 25)
    each = runs.of(detection_s, seeds, nodes=16, cuts=cuts, silent=False)
    all_s = [last for run in each for _, last in run]
    figures = {f"all p{p}": percentile(all_s, p / 100) for p in (50, 90, 99)}
    figures["all max"] = max(all_s)
    return [
        Line(
            experiment="killed",
            setting="n=16, kill -9",
            runs=f"{len(all_s)}",
            figures=figures,
            goal=f"p99 <= {KILLED_GOAL_S:g} s",
            kept=figures["all p99"] <= KILLED_GOAL_S,
        )
    ]


SILENT_RUNS = {2: (4, 50), 3: (4, 50), 5: (4, 50), 16: (4, 25), 32: (4, 25), 100: (4, 10)}
SILENT_RUNS_QUICK = {2: (2, 10), 3: (2, 10), 5: (2, 10), 16: (2, 5), 32: (1, 4)}
"""nodes -> (seeds, cuts in each)"""


def silent(runs: Runs) -> list[Line]:
    lines = []
    for nodes, (seeds, cuts) in (SILENT_RUNS_QUICK if runs.quick else SILENT_RUNS).items():
        medians, p99s = [], []
        for ablation in ("", "plain SWIM order"):
            each = runs.of(
                detection_s, seeds, nodes=nodes, cuts=cuts, silent=True, ablation=ablation
            )
            values = [value for run in each for value in run]
            figures = {
                f"{who} p{p}": percentile([value[index] for value in values], p / 100)
                for index, who in enumerate(("first", "all"))
                for p in (50, 90, 99)
            }
            medians.append(figures["all p50"])
            p99s.append(figures["all p99"])
            goal_s = SILENT_GOALS_S.get(nodes)
            lines.append(
                Line(
                    experiment="silent",
                    setting=f"n={nodes}, {ablation or 'as deployed'}",
                    runs=f"{len(values)}",
                    figures=figures,
                    goal=f"all p99 <= {goal_s:g} s" if goal_s and not ablation else "",
                    kept=figures["all p99"] <= goal_s if goal_s and not ablation else None,
                )
            )
        ratios = {"all p50": medians[0] / medians[1], "all p99": p99s[0] / p99s[1]}
        lines.append(
            Line(experiment="silent", setting=f"n={nodes}, ratio", runs="", figures=ratios)
        )
    return lines


def minority(runs: Runs) -> list[Line]:
    lines = []
    for nodes, few, seeds in ((5, 2, 20), (5, 1, 20), (20, 5, 4), (20, 1, 6)):
        values = runs.of(minority_s, 2 if runs.quick else seeds, nodes=nodes, few=few)
        lines.append(
            Line(
                experiment="minority",
                setting=f"{few} of {nodes}",
                runs=f"{len(values)}",
                figures={"p50": percentile(values, 0.5), "max": max(values)},
            )
        )
    return lines


def false_deaths(runs: Runs) -> list[Line]:
    lines = []
    seeds, long_s, short_s = (1, 300.0, 150.0) if runs.quick else (4, 900.0, 300.0)
    for stalls, seconds, ablations in (
        (SLOW, long_s, WHOLE),
        (GASPING, short_s, WHOLE),
        (GASPING_IN_RAIN, short_s, WHOLE),
        (GASPING_IN_RAIN_OF_FIVE, short_s, PARTS),
    ):
        for ablation in ablations:
            each = runs.of(blame, seeds, stalls=stalls, seconds=seconds, ablation=ablation)
            figures = {
                name: float(sum(getattr(run, name) for run in each)) for name in asdict(each[0])
            }
            false = figures["dead_healthy"] + (figures["dead_slow"] if stalls is SLOW else 0.0)
            goal = "0 deaths" if stalls is SLOW else "0 deaths of the healthy"
            lines.append(
                Line(
                    experiment="false deaths",
                    setting=f"{_stalls_text(stalls)}, {ablation or 'as deployed'}",
                    runs=f"{seeds} x {seconds:g} s",
                    figures=figures,
                    goal="" if ablation else goal,
                    kept=None if ablation else not false,
                )
            )
    return lines


def _stalls_text(stalls: Stalls) -> str:
    return (
        f"n={stalls.nodes}, {stalls.loss:.0%} loss, stalled {stalls.stalled_s:g} s, "
        f"awake {stalls.awake_s:g} s"
    )


def costs(runs: Runs) -> list[Line]:
    return [
        Line(
            experiment="cost",
            setting=f"n={nodes}",
            runs=f"{COST_S:g} s",
            figures=runs.of(cost, 1, nodes=nodes)[0],
        )
        for nodes in ((8, 32) if runs.quick else (8, 32, 100, 300))
    ]


EXPERIMENTS: dict[str, Callable[[Runs], list[Line]]] = {
    "killed": killed,
    "silent": silent,
    "minority": minority,
    "false-deaths": false_deaths,
    "cost": costs,
}

# ----------------------------------------------------------------------------------- the program


def table(lines: Sequence[Line]) -> str:
    """Aligned; the columns are those of the first line."""
    columns = list(lines[0].figures)
    rows = [["", "runs", *columns, "goal"]]
    for line in lines:
        values = [f"{line.figures[c]:.4g}" if c in line.figures else "" for c in columns]
        verdict = "" if line.kept is None else (" kept" if line.kept else " MISSED")
        rows.append([line.setting, line.runs, *values, line.goal + verdict])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if k in (0, len(widths) - 1) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0].experiment, *text])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every goal was kept, 1 if not."""
    parser = argparse.ArgumentParser(prog="benchmarks.reliability")
    parser.add_argument("--quick", action="store_true", help="few runs, small meshes: two minutes")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--only", choices=list(EXPERIMENTS), action="append", help="repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="processes that seeds are shared among")
    chosen = parser.parse_args(arguments)
    runs = Runs(chosen.jobs, quick=chosen.quick)
    lines: list[Line] = []
    for name in chosen.only or EXPERIMENTS:
        found = EXPERIMENTS[name](runs)
        lines += found
        if not chosen.json:
            print(table(found) + "\n", flush=True)
    if chosen.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    return 1 if any(line.kept is False for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
