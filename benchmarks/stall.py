"""How long a node and a training are held up while a large model is averaged.

    python -m benchmarks.stall [--quick] [--json]

A tick every millisecond in the loop of a node (ticking_node.py) that holds a model of 400 MB; the figure
is the longest gap between two ticks. On a busy machine a gap is mostly another process's turn, so the
CPU time that the loop itself took in a gap stands beside it. A round is one length of time in one of
four phases: at rest; hand-over, where nobody else trains; exchange, which the other node began, as it
trains; and both. Rule: the node is the deployed one, with one task more.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.figures import ROUNDS, ROUNDS_QUICK, Figure, bounded, median, parser, present, run
from benchmarks.machine import Machine, Process, machine, run_of, status, until

PARAMETERS = 100_000_000
PARAMETERS_QUICK = 100_000
GOAL_MS = 10.0
REST_S = 1.0
PHASE_S = 18.0
"""Of rounds, for each of the four phases: on a machine with other work they are fewer."""

TRAINED_STEPS = 16
"""Of one round: two hand-overs."""


class Ticks:
    """What the node's ticker says: the longest gap of each tenth of a second."""

    def __init__(self, node: Process) -> None:
        self._heard: list[dict[str, float]] = []
        node.each_line(self._take)

    def _take(self, tick: dict[str, Any]) -> None:
        self._heard.append(tick)

    def during(self, act: Callable[[], object]) -> tuple[float, float]:
        """(longest gap, most CPU time in a gap) while `act` runs, in seconds."""
        began = time.monotonic()
        act()
        ended = time.monotonic()
        until(lambda: self._heard and self._heard[-1]["at"] > ended, "the ticker goes on")
        inside = [tick for tick in self._heard if tick["at"] > began and tick["since"] < ended]
        return max(tick["gap_s"] for tick in inside), max(tick["cpu_s"] for tick in inside)


def figures_of(phase: str, gaps: list[tuple[float, float]], note: str = "") -> list[Figure]:
    """Both figures of one phase, in ms."""
    found = []
    for index, (what, goal) in enumerate((("longest gap", GOAL_MS), ("CPU in a gap", None))):
        values = [1000 * gap[index] for gap in gaps]
        found.append(
            Figure(
                name=f"{phase}: {what}",
                value=median(values),
                worst=max(values),
                unit="ms",
                goal=goal,
                rounds=len(values),
                note="" if index else note,
            )
        )
    return found


def measure(own: Machine, parameters: int, rounds: int) -> list[Figure]:
    task = {"model": "mlp", "parameters": parameters, "batch": 1}
    first, process = own.node("one", module="benchmarks.ticking_node")
    ticks = Ticks(process)
    training = own.trainee(first.state, **task)
    calls: list[float] = []

    def train() -> None:
        calls.append(training.do(steps=TRAINED_STEPS, mesh=True)["longest_step_s"])

    def wait() -> None:
        time.sleep(REST_S)

    train()  # touches every page once
    found = figures_of("at rest", [ticks.during(wait) for _ in bounded(rounds, PHASE_S)])
    calls.clear()
    found += figures_of("hand-over", [ticks.during(train) for _ in bounded(rounds, PHASE_S)])
    second, _ = own.node("two", peer=first)
    other = own.trainee(second.state, **task)
    until(lambda: run_of(second)["exchanges"]["pulled"], "its first weights came from here")

    def others_train() -> None:
        before = run_of(first)["exchanges"]["answered"]
        other.do(steps=TRAINED_STEPS, mesh=True)
        until(lambda: run_of(first)["exchanges"]["answered"] > before, "an exchange is over")

    others_train()
    answered = [ticks.during(others_train) for _ in bounded(rounds, PHASE_S)]
    found += figures_of("exchange", answered)
    other.tell(steps=None, mesh=True)
    before = _exchanges(run_of(first))
    both = [ticks.during(train) for _ in bounded(rounds, PHASE_S)]
    done = _exchanges(run_of(first)) - before
    other.do(steps=0, mesh=False)
    other.hear()
    found += figures_of("both", both, f"{done} exchanges")
    found.append(
        Figure(
            name="longest node.step() of a round",
            value=1000 * median(calls),
            worst=1000 * max(calls),
            unit="ms",
            rounds=len(calls),
            note="merges the offer: passes over the model, in the training itself; its node goes on",
        )
    )
    health = status(first)["node"]["local_health"]
    return [*found, Figure(name="local health of the node, 0 is well", value=health, unit="of 7")]


def _exchanges(run: dict[str, Any]) -> int:
    return int(run["exchanges"]["completed"] + run["exchanges"]["answered"])


def main() -> int:
    flags = parser("stall", "how long a large model holds up a node and a training").parse_args()
    parameters = PARAMETERS_QUICK if flags.quick else PARAMETERS
    with machine() as own:
        figures = measure(own, parameters, ROUNDS_QUICK if flags.quick else ROUNDS)
    return present("stall", figures, flags, model_bytes=4 * parameters)


if __name__ == "__main__":
    run(main)
