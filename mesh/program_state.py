"""What belongs to a whole process and so to one program at a time: chance, arguments, output.

A switch's trip: leave() keeps what is there -> another's enter() puts its own in place. numpy's global
generator is not among it: exchanging that takes longer than a small model's step.
"""

import random
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Self, TextIO

import torch


@dataclass(slots=True, eq=False)
class ProgramState:
    """One program's, while it does not run."""

    chance: Any
    """random's"""
    torch_chance: torch.Tensor
    argv: list[str]
    main: ModuleType
    out: TextIO
    err: TextIO

    @classmethod
    def of_this_moment(cls) -> Self:
        return cls(
            chance=random.getstate(),
            torch_chance=torch.get_rng_state(),
            argv=list(sys.argv),
            main=sys.modules["__main__"],
            out=sys.stdout,
            err=sys.stderr,
        )

    def seeded(self, seed: str) -> "ProgramState":
        """The same, with chance of its own."""
        chance = random.Random(seed)
        generator = torch.Generator()
        generator.manual_seed(chance.getrandbits(63))
        return replace(self, chance=chance.getstate(), torch_chance=generator.get_state())

    def enter(self) -> None:
        random.setstate(self.chance)
        torch.set_rng_state(self.torch_chance)
        sys.argv = list(self.argv)
        sys.modules["__main__"] = self.main
        sys.stdout, sys.stderr = self.out, self.err

    def leave(self) -> None:
        self.chance = random.getstate()
        self.torch_chance = torch.get_rng_state()
        self.argv = list(sys.argv)
