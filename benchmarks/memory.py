"""How much memory averaging takes, in units of the model.

    python -m benchmarks.memory [--quick] [--json]

The extra is the peak of node and training together, less the peak of the same training alone. The two
hand-over buffers are in both processes, so shared pages are counted once: what is resident is read every
20 ms of /proc/PID/status, which costs the processes nothing; PSS (/proc/PID/smaps_rollup, where a page
that two map is half of each) is read once at the end, as it walks through every page. A trip: a training
alone -> the same in the mesh, hand-over by hand-over, while another machine's trains -> peaks. Rule: a
peak is of the whole life, its start included. Linux only.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, median, parser, present, run
from benchmarks.machine import Process, machine, run_of, until
from mesh.core.exchange import AHEAD
from mesh.core.messages import FRAGMENT_ENTRIES

PARAMETERS = 100_000_000
PARAMETERS_QUICK = 1_000_000
STEPS = 16
NODE_GOAL_MB = 60.0
EXTRA_GOAL = 3.1
WINDOW_BYTES = AHEAD * 4 * FRAGMENT_ENTRIES
"""Fragments in flight: the same for every model, so not counted in units of one."""

SAMPLE_S = 0.02
LIVES = 7
"""Of a node without a run: how many are started."""


def _kilobytes(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_rss(process: Process) -> int:
    """The most that was ever resident of it."""
    return _kilobytes(f"/proc/{process.pid}/status", "VmHWM:")


def pss(process: Process) -> int:
    """Its part of what is resident now: a page that two share is half of each."""
    return _kilobytes(f"/proc/{process.pid}/smaps_rollup", "Pss:")


def resident(*processes: Process) -> int:
    """Of all together; they share one memory, the hand-over buffers, which counts once."""
    statuses = [f"/proc/{process.pid}/status" for process in processes]
    own = sum(_kilobytes(path, "RssAnon:") + _kilobytes(path, "RssFile:") for path in statuses)
    return own + max(_kilobytes(path, "RssShmem:") for path in statuses)


@contextmanager
def peak(*processes: Process) -> Iterator[Callable[[], int]]:
    """The most that was resident of them at one moment."""
    highest, over = 0, threading.Event()

    def look() -> None:
        nonlocal highest
        while not over.wait(SAMPLE_S):
            highest = max(highest, resident(*processes))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: highest
    finally:
        over.set()
        watcher.join()


def idle_node(lives: int) -> list[Figure]:
    """A node that knows another and holds no run."""
    rss_mb, pss_mb = [], []
    for _ in range(lives):
        with machine() as own:
            first, _ = own.node("one")
            _, process = own.node("two", peer=first)
            time.sleep(0.2)
            rss_mb.append(peak_rss(process) / 1e6)
            pss_mb.append(pss(process) / 1e6)
    return [
        Figure(
            name=name, value=median(values), worst=max(values), unit="MB", rounds=lives, goal=goal
        )
        for name, values, goal in (
            ("node without a run: peak RSS", rss_mb, NODE_GOAL_MB),
            ("node without a run: PSS", pss_mb, None),
        )
    ]


def with_a_model(parameters: int) -> list[Figure]:
    model_bytes = 4 * parameters
    task = {"model": "mlp", "parameters": parameters, "batch": 1}
    with machine() as own:
        training = own.starting_trainee(None, **task)
        with peak(training) as highest:
            training.hear()
            training.do(steps=STEPS, mesh=False)
        alone, alone_pss = highest(), pss(training)
    with machine() as own:
        first, node = own.node("one")
        second, _ = own.node("two", peer=first)
        idle, idle_pss = resident(node), pss(node)
        training = own.starting_trainee(first.state, **task)
        with peak(node, training) as highest:
            training.hear()
            other = own.trainee(second.state, **task)
            other.tell(steps=None, mesh=True)
            training.do(steps=STEPS, mesh=True)
            until(lambda: _exchanged(run_of(first)), "an exchange each way is over")
            training.do(steps=STEPS, mesh=True)
        together, together_pss = highest(), pss(node) + pss(training)
        node_rss, training_rss = peak_rss(node), peak_rss(training)
        other.do(steps=0, mesh=False)
        other.hear()

    def models(count: int) -> float:
        return count / model_bytes

    extra = together - alone - idle - WINDOW_BYTES
    extra_pss = together_pss - alone_pss - idle_pss - WINDOW_BYTES
    found = {
        "training alone: peak": alone,
        "training in the mesh: peak RSS": training_rss,
        "its node: peak RSS": node_rss,
        "both in the mesh: peak": together,
        "extra at the end, by PSS": extra_pss,
    }
    return [
        *(Figure(name=name, value=models(count), unit="models") for name, count in found.items()),
        Figure(
            name="extra: the peak in the mesh less the peak alone",
            value=models(extra),
            unit="models",
            goal=EXTRA_GOAL,
            note=f"less an idle node and the window of {WINDOW_BYTES >> 20} MiB",
        ),
    ]


def _exchanged(run: dict[str, Any]) -> bool:
    return bool(run["exchanges"]["completed"] and run["exchanges"]["answered"])


def main() -> int:
    flags = parser("memory", "what averaging takes of the memory").parse_args()
    parameters = PARAMETERS_QUICK if flags.quick else PARAMETERS
    figures = idle_node(1 if flags.quick else LIVES) + with_a_model(parameters)
    return present("memory", figures, flags, model_bytes=4 * parameters)


if __name__ == "__main__":
    run(main)
