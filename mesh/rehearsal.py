"""Whether an optimizer can make a step with the state of a checkpoint, found out before it is loaded.

A state's trip: decoded, its types right -> rehearse(): an optimizer of the same class and settings makes
one step on small parameters of as many dimensions, so that its state has every entry that there has to
be -> each saved entry is compared: there, a tensor or a number as it should be, of the parameter's
sizes or of 1 where the rehearsed one is.

Rules: 1. Nothing here touches the optimizer that is to be loaded. 2. One that cannot be rehearsed (it
wants a closure, sparse gradients, or is made in a way of its own) is taken at its word, and so is any but
torch's and ours: what it keeps may depend on a parameter's size.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

import torch

from mesh.errors import UsageError

SIZES: Final = (2, 3, 5, 7)
"""Of a stand-in's dimensions, over and over: above 1, and never alike in two that lie side by side."""

KNOWN: Final = ("torch", "mesh")

CANNOT: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)
"""What an optimizer raises that cannot be rehearsed."""

Entries = dict[str, Any]


def rehearse(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raises UsageError where `state`, of optimizer.state_dict()'s form, would fail at the next step."""
    if type(optimizer).__module__.split(".")[0] not in KNOWN:
        return
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        wanted: dict[tuple[int, torch.device], Entries] = {}
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            entries = state["state"].get(number)
            if not entries:  # no step was made yet
                continue
            kind = parameter.dim(), parameter.device
            if kind not in wanted:
                wanted[kind] = _after_a_step(type(optimizer), saved, *kind)
            for name, value in wanted[kind].items():
                said = f"the optimizer's {name} of parameter {number}"
                if name not in entries:
                    raise UsageError(f"{said} is missing")
                _compare(said, entries[name], value, parameter)


def _stand_in(dimensions: int, device: torch.device) -> torch.Tensor:
    return torch.ones([SIZES[axis % len(SIZES)] for axis in range(dimensions)], device=device)


def _after_a_step(
    kind: type[torch.optim.Optimizer],
    settings: Mapping[str, Any],
    dimensions: int,
    device: torch.device,
) -> Entries:
    """The state of one stand-in after one step; empty where there can be none."""
    parameter = torch.nn.Parameter(_stand_in(dimensions, device))
    parameter.grad = torch.ones_like(parameter)
    group = {**settings, "params": [parameter]}
    try:
        twin = kind.__new__(kind)
        twin.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": [group]})
        twin.step()
        return dict(twin.state[parameter])
    except CANNOT:
        return {}


def _compare(said: str, saved: object, made: object, parameter: torch.Tensor) -> None:
    if not isinstance(made, torch.Tensor):
        if isinstance(made, int | float) and not isinstance(saved, int | float | torch.Tensor):
            raise UsageError(f"{said} is {str(saved)[:40]}, no number")
        return
    if made.numel() == 1:
        if isinstance(saved, torch.Tensor) and saved.numel() != 1:
            raise UsageError(f"{said} holds {saved.numel()} numbers: it is one")
        if not isinstance(saved, torch.Tensor | int | float):
            raise UsageError(f"{said} is {str(saved)[:40]}, no number")
        return
    stand_in = _stand_in(parameter.dim(), torch.device("cpu"))
    if made.dim() != stand_in.dim():
        return  # of a shape of its own
    wanted = [
        size if mine == its else mine
        for size, its, mine in zip(parameter.shape, stand_in.shape, made.shape, strict=True)
    ]
    if not isinstance(saved, torch.Tensor) or list(saved.shape) != wanted:
        here = list(saved.shape) if isinstance(saved, torch.Tensor) else str(saved)[:40]
        raise UsageError(f"{said} is {here}: it has the shape {wanted}")
