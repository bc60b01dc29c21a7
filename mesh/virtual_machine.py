"""One machine of a laboratory: its program, its node, and what its training came to."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
import trio

from mesh.answers import Answers
from mesh.arrays import Floats
from mesh.baton import Program
from mesh.control import Control
from mesh.learning_report import Curve
from mesh.program_state import ProgramState
from mesh.tensors import Tensors
from mesh.virtual_link import VirtualLines
from mesh.virtual_node import LaboratoryNode


@dataclass(slots=True, eq=False)
class Machine:
    """One virtual machine: its program and, unless it is a reference's, its node."""

    rank: int
    index: int
    newcomer: bool
    speed: float
    rng: Random
    program: Program
    state: ProgramState
    steps_left: int | None
    node: LaboratoryNode | None = None
    answers: Answers | None = None
    control: Control | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    nursery: trio.Nursery | None = None
    lines: list[VirtualLines] = field(default_factory=list)
    model: torch.nn.Module | None = None
    tensors: Tensors | None = None
    """while its training is joined"""
    schema: list[list[Any]] = field(default_factory=list)
    """(name, shape) of what is averaged"""
    weight: float = 1.0
    final: Floats | None = None
    """its weights when its training ended"""
    losses: Curve[tuple[int, float]] = field(default_factory=Curve)
    steps: int = 0
    killed: bool = False


def flat_of(machine: Machine) -> Floats:
    """The machine's weights now, in its model's order."""
    assert machine.tensors is not None
    flat = np.empty(machine.tensors.entries, dtype=np.float32)
    machine.tensors.fill(flat)
    return flat


def mean_of(replicas: list[tuple[Machine, Floats]]) -> tuple[Floats, float]:
    """The average by weight, and the RMS distance to it."""
    total = sum(machine.weight for machine, _ in replicas)
    mean = np.zeros(len(replicas[0][1]), dtype=np.float64)
    for machine, flat in replicas:
        mean += machine.weight / total * flat
    squares = sum(float(np.square(flat - mean).sum()) for _, flat in replicas)
    return mean.astype(np.float32), (squares / len(replicas)) ** 0.5
