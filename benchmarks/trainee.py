"""A training that benchmarks tell what to do: one JSON line in, one JSON line out.

Orders: {"steps": n, "mesh": bool} trains n steps, with or without node.step(); {"steps": null, ...}
trains until the next order, whatever that is. The end of its input is its end. Rule: alone and in the
mesh it does the same, but for node.step().
"""

import contextlib
import json
import random
import select
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mesh

LETTERS = 57
LANGUAGES = 18
HIDDEN = 128
RATE = 1e-4
"""Small: what is measured is time, and weights have to stay finite."""


class Mlp:
    """`parameters` weights in two layers, `batch` rows a step."""

    def __init__(self, parameters: int, batch: int) -> None:
        width = max(1, round((parameters / 2) ** 0.5))
        self.model: torch.nn.Module = torch.nn.Sequential(
            torch.nn.Linear(width, width, bias=False),
            torch.nn.ReLU(),
            torch.nn.Linear(width, width, bias=False),
        )
        self._rows = torch.randn(batch, width)

    def loss(self) -> torch.Tensor:
        result: torch.Tensor = self.model(self._rows).square().mean()
        return result


class Names:
    """The network of examples/names_rnn.py, one name of random letters a step."""

    def __init__(self) -> None:
        self._hidden = torch.nn.Linear(LETTERS + HIDDEN, HIDDEN)
        self._answer = torch.nn.Linear(LETTERS + HIDDEN, LANGUAGES)
        self.model: torch.nn.Module = torch.nn.ModuleList([self._hidden, self._answer])
        self._chance = random.Random(1)
        self._one_hot = torch.eye(LETTERS)

    def loss(self) -> torch.Tensor:
        length = self._chance.randint(4, 10)
        name = self._one_hot[[self._chance.randrange(LETTERS) for _ in range(length)]]
        target = torch.tensor([self._chance.randrange(LANGUAGES)])
        hidden = torch.zeros(1, HIDDEN)
        for letter in name[:-1]:
            hidden = self._hidden(torch.cat((letter[None], hidden), 1))
        answer = self._answer(torch.cat((name[-1:], hidden), 1))
        return torch.nn.functional.nll_loss(torch.log_softmax(answer, 1), target)


class Linear:
    """As small as a model gets: that of start.py's script."""

    def __init__(self) -> None:
        self.model: torch.nn.Module = torch.nn.Linear(64, 10)
        self._rows = torch.randn(8, 64)

    def loss(self) -> torch.Tensor:
        result: torch.Tensor = self.model(self._rows).square().mean()
        return result


Task = Mlp | Names | Linear


def _task(about: dict[str, Any]) -> Task:
    match about["model"]:
        case "mlp":
            return Mlp(about["parameters"], about["batch"])
        case "rnn":
            return Names()
        case _:
            return Linear()


class Trainee:
    """A model, its optimizer and its node."""

    def __init__(self, task: Task, node: "mesh.JoinedNode | None") -> None:
        self._task = task
        self._optimizer = torch.optim.SGD(task.model.parameters(), lr=RATE)
        self._node = node

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        steps, node = order["steps"], self._node if order["mesh"] else None
        began, longest_s, count = time.perf_counter(), 0.0, 0
        while count != steps if steps is not None else not _is_told():
            loss = self._task.loss()
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            value = loss.item()
            if node is not None:
                before = time.perf_counter()
                node.step(loss=value, samples=1)
                longest_s = max(longest_s, time.perf_counter() - before)
            count += 1
        return {
            "steps": count,
            "seconds": time.perf_counter() - began,
            "longest_step_s": longest_s,
        }


def _is_told() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    about = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    task = _task(about)
    with contextlib.ExitStack() as stack:
        node = None
        if about["state"] is not None:
            settings = mesh.NodeSettings(state=Path(about["state"]))
            joined = mesh.join(
                task.model, run="benchmark", every=8, settings=settings, sync_timeout=1.0
            )
            node = stack.enter_context(joined)
        trainee = Trainee(task, node)
        _say(event="ready")
        while line := sys.stdin.readline():
            _say(**trainee.obey(json.loads(line)))


if __name__ == "__main__":
    main()
