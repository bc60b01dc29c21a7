"""How much slower a training is that averages with another machine's every 8 steps.

    python -m benchmarks.overhead [--quick] [--json]

Both ends run on this one machine, so it pays for the other end's work too, which a real mesh does not.
Two cases of the other end: its training trains the same model meanwhile, or is attached and idle, so
that its node mostly answers. A round's trip: n steps alone, both nodes stopped (SIGSTOP) -> n steps in
the mesh -> their ratio; the next round the other way round. Rule: one process does both, with one
model, and the other end's training, where it trains, trains in both halves.
"""

from benchmarks.figures import ROUNDS, ROUNDS_QUICK, Figure, bounded, median, parser, present, run
from benchmarks.machine import Process, cpu_s, machine, run_of, stopped

GOALS = {"mlp": 0.05, "rnn": 0.15}
MLP: dict[str, object] = {"model": "mlp", "parameters": 10_000_000, "batch": 64}
MLP_QUICK: dict[str, object] = {"model": "mlp", "parameters": 10_000, "batch": 8}
RNN: dict[str, object] = {"model": "rnn"}
STEPS = {"mlp": 16, "rnn": 1600}
"""Of one half of a round: whole hand-overs, about a second and a half."""

CASE_S = 20.0
"""Of rounds, for each of the four cases: on a machine with other work they are fewer."""

STEPS_QUICK = {"mlp": 16, "rnn": 32}


def measure(task: dict[str, object], steps: int, rounds: int, *, trains: bool) -> list[Figure]:
    """Slow-down of one training by the mesh."""
    with machine() as own:
        first, first_node = own.node("one")
        second, second_node = own.node("two", peer=first)
        nodes = (first_node, second_node)
        training = own.trainee(first.state, **task)
        other = own.trainee(second.state, **task)
        training.do(steps=steps, mesh=True)  # the first weights, warm caches
        if not trains:
            other.do(steps=16, mesh=True)  # its weights count as begun
        before = run_of(first)["exchanges"]
        ratios, alone_s, busy = [], [], []
        for index in bounded(rounds, CASE_S):
            halves = {}
            for mesh in (False, True) if index % 2 else (True, False):
                began_s = sum(cpu_s(node.pid) for node in nodes)
                halves[mesh] = _half(training, other, nodes, steps, mesh=mesh, trains=trains)
                if mesh:
                    busy.append((sum(cpu_s(n.pid) for n in nodes) - began_s) / halves[mesh])
            ratios.append(halves[True] / halves[False])
            alone_s.append(halves[False] / steps)
        after = run_of(first)["exchanges"]
    done = after["completed"] - before["completed"] + after["answered"] - before["answered"]
    model = str(task["model"])
    where = f"{model}, the other {'trains' if trains else 'is idle'}"
    slower = [ratio - 1 for ratio in ratios]
    said = f"{done} exchanges in {len(ratios)} halves, {after['failed'] - before['failed']} failed"
    return [
        Figure(
            name=f"{where}: slow-down",
            value=median(slower),
            worst=max(slower),
            unit="of a step",
            goal=GOALS[model],
            rounds=len(ratios),
            note=said,
        ),
        Figure(
            name=f"{where}: steps alone",
            value=1 / median(alone_s),
            worst=1 / max(alone_s),
            unit="steps/s",
            rounds=len(ratios),
        ),
        Figure(
            name=f"{where}: both nodes' CPU",
            value=median(busy),
            worst=max(busy),
            unit="cores",
            rounds=len(ratios),
        ),
    ]


def _half(
    training: Process,
    other: Process,
    nodes: tuple[Process, Process],
    steps: int,
    *,
    mesh: bool,
    trains: bool,
) -> float:
    """Seconds that `steps` steps took."""
    if trains:
        other.tell(steps=None, mesh=mesh)
    try:
        if mesh:
            return float(training.do(steps=steps, mesh=True)["seconds"])
        with stopped(*nodes):
            return float(training.do(steps=steps, mesh=False)["seconds"])
    finally:
        if trains:
            other.do(steps=0, mesh=False)
            other.hear()


def main() -> int:
    chosen = parser("overhead", "what averaging every 8 steps costs a training").parse_args()
    quick = chosen.quick
    figures = []
    for task in (MLP_QUICK if quick else MLP, RNN):
        steps = (STEPS_QUICK if quick else STEPS)[str(task["model"])]
        for trains in (False, True):
            rounds = ROUNDS_QUICK if quick else ROUNDS
            figures += measure(task, steps, rounds, trains=trains)
    return present("overhead", figures, chosen)


if __name__ == "__main__":
    run(main)
