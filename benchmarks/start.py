"""How long one waits: for an answer of the shell, for a node to become a member, for a first exchange.

    python -m benchmarks.start [--quick] [--json]

`mesh status` and `mesh peers`: a process from nothing to its end; then `peers` and `top` of a node that
knows a hundred (crowd.py). A node: from its start until it and
the one that was up list each other as alive, found over mDNS on loopback. `mesh run`: from the command
until its script has completed an exchange (it takes its first weights from a training that is there),
less what a process takes to import torch and make an optimizer, which imports half of torch again, in
the same round. CPU time stands beside: on a busy machine that is what can be compared. Rule: all is
started as a shell starts it, with a fresh interpreter; nothing is kept warm but the disk.
"""

import json
import resource
import subprocess
import sys
import time
from statistics import mean

from benchmarks.figures import ROUNDS, ROUNDS_QUICK, Figure, bounded, median, parser, present, run
from benchmarks.machine import LOOPBACK, STOP_S, Machine, alive, machine, until
from mesh.client import RunningNode

ASK_GOAL_MS = 120.0
CROWD = 100
CROWD_GOAL_MS = 300.0
MEMBER_GOAL_S = 1.5
EXCHANGE_GOAL_S = 1.0
EXCHANGE_S = 75.0
"""After so long no further round of `mesh run` begins: each takes two imports of torch."""

ASKED_EACH = 3
"""Questions of a round: one takes a tenth of a second."""

TORCH = """
import json, time, torch
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
"""

SAY = """print(json.dumps({"at": time.monotonic()}), flush=True)
"""

SCRIPT = """
import mesh
with mesh.join(model, optimizer, run="benchmark") as node:
    while not node.statistics().exchanges:
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        node.step(samples=8)
"""


def timed(own: Machine, *arguments: str) -> tuple[float, float]:
    """(seconds, seconds of CPU) of one Python process from nothing to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        env=own.environment,
        cwd=own.root,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, used_s


def ask_the_shell(own: Machine, rounds: int) -> list[Figure]:
    """The commands and, as what nobody can do without, an interpreter that does nothing."""
    commands = {
        "python -c pass": ("-c", "pass"),
        "mesh status": ("-m", "nodes.cli", "status"),
        "mesh peers": ("-m", "nodes.cli", "peers"),
    }
    return each_command(own, commands, rounds, ASK_GOAL_MS)


def ask_in_a_crowd(own: Machine, rounds: int) -> list[Figure]:
    """The same of one of a hundred nodes; the other 99 are slowed down, as if on other machines."""
    state = own.root / "crowd"
    order = {"state": str(state), "nodes": CROWD}
    own.spawn("-m", "benchmarks.crowd", json.dumps(order)).hear()
    commands = {
        f"mesh {name} of {CROWD} nodes": ("-m", "nodes.cli", *name.split(), "--state", str(state))
        for name in ("peers", "peers -o wide", "top")
    }
    return each_command(own, commands, rounds, CROWD_GOAL_MS)


def each_command(
    own: Machine, commands: dict[str, tuple[str, ...]], rounds: int, goal_ms: float
) -> list[Figure]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            each = [timed(own, *arguments) for _ in range(ASKED_EACH)]
            taken[name].append((median([t[0] for t in each]), mean([t[1] for t in each])))
    found = []
    for name, times in taken.items():
        for index, what in enumerate((name, f"{name}: CPU")):
            values = [1000 * both[index] for both in times]
            goal = goal_ms if not index and name.startswith("mesh") else None
            found.append(figure(what, values, "ms", goal))
    return found


def become_a_member(own: Machine, first: RunningNode, rounds: int) -> list[Figure]:
    seconds = []
    for index in range(rounds):
        began = time.perf_counter()
        second, process = own.node(f"member{index}", mdns=True)
        until(lambda: alive(second) == 1 == alive(first), "both list each other")  # noqa: B023
        seconds.append(time.perf_counter() - began)
        process.ask_to_end()
        process.end(time.monotonic() + STOP_S)
        until(lambda: alive(first) == 0, "it is gone")
    return [figure("start of a node to member of a mesh", seconds, "s", MEMBER_GOAL_S)]


def first_exchange(own: Machine, first: RunningNode, rounds: int) -> list[Figure]:
    script = own.root / "script.py"
    script.write_text(TORCH + SCRIPT + "    " + SAY)
    own.trainee(first.state, model="linear")
    torch_s: list[float] = []
    more_s: list[float] = []
    for index in bounded(rounds, EXCHANGE_S):
        state = own.member(f"runner{index}")
        began = time.monotonic()
        process = own.spawn("-c", TORCH + SAY)
        torch_s.append(process.hear()["at"] - began)
        process.end(time.monotonic() + STOP_S)
        flags = ["--state", str(state), "--interface", LOOPBACK]
        began = time.monotonic()
        process = own.spawn("-m", "nodes.cli", "run", *flags, str(script))
        more_s.append(process.hear()["at"] - began - torch_s[-1])
        process.end(time.monotonic() + 2 * STOP_S)  # its script ends, and its node with it
        until(lambda: alive(first) == 0, "it is gone")
    name = "mesh run to a completed exchange, less torch"
    return [
        figure("torch and an optimizer, without mesh", torch_s, "s"),
        figure(name, more_s, "s", EXCHANGE_GOAL_S),
    ]


def figure(name: str, values: list[float], unit: str, goal: float | None = None) -> Figure:
    return Figure(
        name=name,
        value=median(values),
        worst=max(values),
        unit=unit,
        goal=goal,
        rounds=len(values),
    )


def main() -> int:
    flags = parser("start", "how long one waits for a first answer").parse_args()
    rounds = ROUNDS_QUICK if flags.quick else ROUNDS
    with machine() as own:
        first, _ = own.node("first", mdns=True)
        figures = ask_the_shell(own, rounds)
        figures += become_a_member(own, first, rounds)
        figures += first_exchange(own, first, rounds)
        figures += ask_in_a_crowd(own, rounds)
    return present("start", figures, flags)


if __name__ == "__main__":
    run(main)
