"""Is the learning lab true? examples/digits.py on three real nodes, and on three virtual ones.

    python -m benchmarks.digits [--quick] [--json]      two minutes: three seeds of both

No node has a digit of another's. Real: three processes of `python -m mesh`, three trainings, TLS over the
loopback interface, a step every 10 ms as in the lab. Virtual: `mesh sim` on the same script. Compared: the
averaged model's accuracy, the worst node's, and the RMS distance of the replicas to their mean.
A training's trip: trainee() in a process of its own -> the example's own train() -> "trained" -> told that
all have -> its last weights, as node.averaged() has them -> their accuracies and drift, here.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import mesh
from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.machine import LOOPBACK, REPOSITORY, Process, machine
from examples import digits
from mesh.tensors import Tensors

NODES = 3
SEEDS = (1, 2, 3)
STEPS = 600
STEPS_QUICK = 60
EVERY = 4
STEP_S = 0.01
"""As long as a virtual machine's (mesh/conditions.py): exchanges take a few milliseconds on both."""

NOISE = 1.0
"""Points of accuracy that the two means may lie apart; one of the 450 test digits is 0.22."""

WAIT_S = 60.0


class Paced:
    """A JoinedNode whose steps last STEP_S: three trainings on two cores are as fast as each other."""

    def __init__(self, node: mesh.JoinedNode) -> None:
        self._node = node
        self._next = time.monotonic()
        self.averaged = node.averaged

    def step(self, **about: Any) -> None:
        self._node.step(**about)
        self._next = max(self._next + STEP_S, time.monotonic() - STEP_S)
        time.sleep(max(0.0, self._next - time.monotonic()))


def built(seed: int) -> torch.nn.Module:
    """The example's model."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def trainee(state: str, rank: int, seed: int, steps: int, out: str) -> None:
    """One real training, from its first weights to its last."""
    torch.set_num_threads(1)
    model = built(seed)
    torch.manual_seed(1000 * seed + rank)
    arguments = SimpleNamespace(lr=0.2, seconds=0.0, steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr)
    settings = mesh.NodeSettings(state=Path(state), interfaces=(LOOPBACK,))
    with mesh.join(model, optimizer, run="digits", every=EVERY, settings=settings) as node:
        node.wait_for_peers(NODES - 1, timeout=WAIT_S)
        with contextlib.redirect_stdout(sys.stderr):
            digits.train(Paced(node), model, optimizer, digits.load((rank, NODES)), arguments)
        print(json.dumps({"trained": True}), flush=True)
        sys.stdin.readline()
        with node.averaged():
            flat = np.empty(Tensors(model).entries, dtype=np.float32)
            Tensors(model).fill(flat)
            np.save(out, flat)
        print(json.dumps({"exchanges": node.statistics().exchanges}), flush=True)
        sys.stdin.readline()


def real(seed: int, steps: int) -> dict[str, float]:
    """Three processes of nodes, and three that train."""
    with machine() as own:
        first, _ = own.node("n1")
        states = [first.state, *(own.node(f"n{k}", peer=first)[0].state for k in (2, 3))]
        outs = [own.root / f"{rank}.npy" for rank in range(1, NODES + 1)]
        trainings: list[Process] = [
            own.spawn(
                *("-m", "benchmarks.digits", "--trainee", str(state)),
                *map(str, (rank, seed, steps, out)),
            )
            for rank, (state, out) in enumerate(zip(states, outs, strict=True), 1)
        ]
        for told in (False, True):
            for training in trainings:
                if told:
                    training.tell(end=True)
            for training in trainings:
                training.hear()
        replicas = np.stack([np.load(out) for out in outs]).astype(np.float64)
    mean = replicas.mean(axis=0)
    found = [accuracy(flat) for flat in (mean, *replicas)]
    apart = float(np.sqrt(np.square(replicas - mean).sum(axis=1).mean()))
    return {"averaged": found[0], "worst_node": min(found[1:]), "drift": apart}


def accuracy(flat: np.ndarray) -> float:
    model = built(0)
    Tensors(model).load(flat.astype(np.float32))
    return 100 * float(digits.evaluate(model))


def virtual(seed: int, steps: int) -> dict[str, float]:
    """The same script in the lab."""
    script = [str(REPOSITORY / "examples" / "digits.py"), "--shard", "{rank}/{nodes}"]
    with tempfile.TemporaryDirectory() as directory:  # for the plot, which nobody looks at
        done = subprocess.run(
            [
                *(sys.executable, "-m", "nodes.cli", "sim", "-n", str(NODES), "--seed", str(seed)),
                *("--json", "-o", f"{directory}/plot.png", "--evaluate", "evaluate"),
                *("--strategies", "pair", *script),
                *("--steps", str(steps), "--every", str(EVERY), "--seed", str(seed)),
            ],
            capture_output=True,
            check=True,
            cwd=REPOSITORY,
            text=True,
        )
    found = json.loads(done.stdout)["strategies"]["pair"]
    scale = {"averaged": 100.0, "worst_node": 100.0, "drift": 1.0}
    return {name: factor * found[name] for name, factor in scale.items()}


def main() -> int:
    parser = figures.parser("digits", "digits on three real nodes, and on three virtual ones")
    parser.add_argument("--trainee", nargs=5, help="how this starts its own trainings")
    flags = parser.parse_args()
    if flags.trainee:
        state, rank, seed, steps, out = flags.trainee
        trainee(state, int(rank), int(seed), int(steps), out)
        return 0
    seeds, steps = (SEEDS[:1], STEPS_QUICK) if flags.quick else (SEEDS, STEPS)
    found = {ways.__name__: [ways(seed, steps) for seed in seeds] for ways in (real, virtual)}
    lines, means = [], {}
    for way, of_seeds in found.items():
        for name in ("averaged", "worst_node", "drift"):
            values = [one[name] for one in of_seeds]
            means[way, name] = fmean(values)
            spread = stdev(values) if len(values) > 1 else 0.0
            unit = "L2" if name == "drift" else "%"
            lines.append(
                Figure(
                    name=f"{way}: {name}",
                    value=means[way, name],
                    unit=unit,
                    rounds=len(values),
                    note=f"± {spread:.2g} over the seeds",
                )
            )
    lines.append(
        Figure(
            name="averaged: real and virtual apart",
            value=abs(means["real", "averaged"] - means["virtual", "averaged"]),
            unit="points",
            goal=NOISE,
            rounds=len(seeds),
        )
    )
    return figures.present("digits", lines, flags, steps=steps, nodes=NODES, seeds=found)


if __name__ == "__main__":
    figures.run(main)
