"""What each machine of a lab trains: a linear model whose inputs come in blocks, one a machine.

A machine's own data says nothing of the other blocks, so whoever predicts all of them has learned
from every machine. Usage: train.py BLOCK DIRECTORY. It touches DIRECTORY/learned when it does, goes
on training until DIRECTORY/rest exists, then writes the averaged weights to DIRECTORY/weights.npy
again and again until DIRECTORY/enough exists.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

import mesh

BLOCKS = 3
BLOCK_LENGTH = 4
STEPS = 40
LEARNED = 1e-4


def truth() -> torch.Tensor:
    """The weights that the blocks' data were made with."""
    return torch.linspace(-1.0, 1.0, BLOCKS * BLOCK_LENGTH).reshape(1, -1)


def main(block: int, directory: Path) -> None:
    torch.manual_seed(block)
    model = torch.nn.Linear(BLOCKS * BLOCK_LENGTH, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = torch.zeros(BLOCKS * BLOCK_LENGTH)
    mine[block * BLOCK_LENGTH : (block + 1) * BLOCK_LENGTH] = 1.0
    everything = torch.randn(256, BLOCKS * BLOCK_LENGTH)
    with mesh.join(model, optimizer, run="blocks") as node:
        # Nobody rests before all have learned: nobody else could improve on that one's block.
        while not (directory / "rest").exists():
            for _ in range(STEPS):
                x = torch.randn(32, BLOCKS * BLOCK_LENGTH) * mine
                loss = loss_on(model, x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                node.step(loss=loss.item(), samples=len(x))
            if loss_of_average(node, model, everything) < LEARNED:
                (directory / "learned").touch()
        while not (directory / "enough").exists():
            with node.averaged():
                write(model, directory)
            time.sleep(0.05)


def loss_on(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(x), x @ truth().T)


def loss_of_average(node: mesh.JoinedNode, model: torch.nn.Module, x: torch.Tensor) -> float:
    with node.averaged(), torch.no_grad():
        return loss_on(model, x).item()


def write(model: torch.nn.Module, directory: Path) -> None:
    """Whole or not at all: somebody reads it at the same time."""
    flat = torch.cat([value.flatten() for value in model.state_dict().values()])
    temporary = directory / "weights.tmp.npy"
    np.save(temporary, flat.numpy())
    temporary.replace(directory / "weights.npy")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
