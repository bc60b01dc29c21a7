"""One training of `mesh demo`: a process of its own, started and told by demo.py.

It learns digits of its own classes only, beside a twin that never averages. Commands come as lines on
standard input (`go`, `finish`, `bye`; its end means the demo is gone), results leave as JSON lines.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from sklearn.datasets import load_digits

import mesh

EVERY = 2
LEARNING_RATE = 0.2
BATCH = 32
STEP_S = 0.004
"""A pause after each step: three trainings and three nodes share the machine with its user."""

PATIENCE_S = 0.05
REPORT_S = 0.5
LAST_ROUNDS = 3
"""Exchanges after the last step: every replica meets the others once more."""

Data = tuple[torch.Tensor, torch.Tensor]


def digits(index: int, nodes: int) -> tuple[Data, Data, list[int]]:
    """(own training data, test data of all ten classes, own classes) of node `index`."""
    raw = load_digits()
    images = torch.tensor(raw.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(raw.target)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):  # a fifth of each class, so that no node knows more than its share
        test[(labels == label).nonzero().flatten()[::5]] = True
    own = [label for label in range(10) if label % nodes == index]
    mine = ~test & torch.isin(labels, torch.tensor(own))
    return (images[mine], labels[mine]), (images[test], labels[test]), own


def mlp() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


class Learner:
    """A model and its optimizer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def learn(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        """Percent right."""
        images, labels = data
        return 100 * float((self.model(images).argmax(1) == labels).float().mean())


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _commands() -> "queue.Queue[str]":
    found: queue.Queue[str] = queue.Queue()

    def read() -> None:
        command = ""
        for line in sys.stdin:
            command = line.strip()
            found.put(command)
        if command != "bye":
            os.kill(os.getpid(), signal.SIGTERM)  # the demo is gone

    threading.Thread(target=read, daemon=True).start()
    return found


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends through the `with`, so that the node ends first; once is enough."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _batches(data: Data, generator: torch.Generator) -> Iterator[Data]:
    images, labels = data
    while True:
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        yield images[rows], labels[rows]


def main() -> None:
    signal.signal(signal.SIGTERM, _leave)
    about = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(about["index"])  # different first weights on purpose: the mesh agrees on some
    commands = _commands()
    own, test, classes = digits(about["index"], about["nodes"])
    learner = Learner(mlp())
    settings = mesh.NodeSettings.from_json(about["settings"])
    with mesh.join(
        learner.model,
        learner.optimizer,
        run="digits",
        every=EVERY,
        patience=PATIENCE_S,
        sync_timeout=about["sync_timeout_s"],
        settings=settings,
    ) as node:
        twin = Learner(mlp())
        twin.model.load_state_dict(learner.model.state_dict())
        _say(event="ready", classes=classes)
        assert commands.get() == "go"
        batches = _batches(own, torch.Generator().manual_seed(about["index"]))
        report_at = 0.0
        while commands.empty():
            images, labels = next(batches)
            loss = learner.learn(images, labels)
            twin.learn(images, labels)
            node.step(loss=loss, samples=BATCH)
            if time.monotonic() >= report_at:
                with node.averaged():
                    accuracy = learner.accuracy(test)
                _say(event="progress", accuracy=accuracy, alone=twin.accuracy(test))
                report_at = time.monotonic() + REPORT_S
            time.sleep(STEP_S)
        for _ in range(LAST_ROUNDS):
            with node.averaged():
                accuracy = learner.accuracy(test)
        _say(event="final", accuracy=accuracy, alone=twin.accuracy(test))
        while commands.get() != "bye":
            pass


if __name__ == "__main__":
    main()
