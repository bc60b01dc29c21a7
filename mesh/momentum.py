"""QuasiGlobalSGD: momentum that follows the mesh, not only this node's own data (Lin et al. 2021).

On uneven data a node's own momentum pulls it towards its own data again after every averaging.
Quasi-global momentum m is read off how the averaged model moves. At each step, with gradient g:

    v = momentum m + g;  x -= lr (g + momentum v)              m stands still between mixings

and when the mesh has changed x, which the last such change left at `a`:

    m = mu m + (1 - mu) (a - x) / (sum of lr since then);  a = x

Lin et al. mix at every step. Where k steps lie between two mixings mu is taken to the power of k, or momentum
would remember k times as many steps (docs/momentum.md). Rules: 1. Nothing here knows a mesh: JoinedNode says
mixed(steps=k) after it brought an offer into the model.
2. State is float32 where a parameter is float16 or bfloat16: (a - x) is a few of their steps.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.optim.optimizer import ParamsT

from mesh.errors import UsageError

LOW_PRECISION: Final = (torch.float16, torch.bfloat16)


class QuasiGlobalSGD(torch.optim.Optimizer):
    """SGD with quasi-global momentum: for `mesh.join` on data that differ from node to node.

    lr: learning rate; schedulers may change it, each step counts with its own.
    momentum: how much of m every step takes.
    mu: how much of m is kept at a mixing, for each of its steps.
    weight_decay: adds weight_decay * x to each gradient.

    Without a mesh m stays 0, and a step is x -= lr (1 + momentum) g. State of each parameter: two
    tensors of its size, `m` and `a`; groups keep `lr_sum`, the sum of lr since the last mixing.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        mu: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        """Raises UsageError."""
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{name}={value!r}: a number from 0")
        for name, value in (("momentum", momentum), ("mu", mu)):
            if not 0 <= value < 1:
                raise UsageError(f"{name}={value!r}: a number from 0, below 1")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "mu": mu,
            "weight_decay": weight_decay,
            "lr_sum": 0.0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the closure's loss where there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, lr)
            group["lr_sum"] += lr
        return loss

    @torch.no_grad()
    def mixed(self, steps: int = 1) -> None:
        """The mesh has just changed x: what it moved since the last mixing goes into the momentum.

        steps: how many were made since then, of which each keeps mu of m; 1: mu for the mixing, as in
        the paper, however many they were.
        Where every lr since then was 0 there is nothing to divide by, and m stays as it is.
        """
        for group in self.param_groups:
            if group["lr_sum"] > 0:
                kept = group["mu"] ** max(1, steps)
                for parameter in group["params"]:
                    state = self.state.get(parameter)
                    if state:
                        moved = (state["a"] - parameter).div_(group["lr_sum"])
                        state["m"].mul_(kept).add_(moved, alpha=1 - kept)
        self.anchor()

    @torch.no_grad()
    def anchor(self) -> None:
        """a = x: the weights came from elsewhere (a donor, a checkpoint), and m learns nothing of it."""
        for group in self.param_groups:
            group["lr_sum"] = 0.0
            for parameter in group["params"]:
                # One that was frozen on the way is still moved by the mesh.
                if parameter.requires_grad or parameter in self.state:
                    self._state(parameter)["a"].copy_(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but state stays float32 where parameters are of low precision."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved and parameter.dtype in LOW_PRECISION:
                for name, tensor in saved.items():
                    self.state[parameter][name] = tensor.to(
                        parameter.device, torch.float32, copy=True
                    )

    def _step(self, parameter: torch.Tensor, group: dict[str, Any], lr: float) -> None:
        m = self._state(parameter)["m"]
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise UsageError(
                "QuasiGlobalSGD takes no sparse gradients: make the layer sparse=False"
            )
        x = parameter.to(m.dtype)
        g = parameter.grad.to(m.dtype)
        if group["weight_decay"]:
            g = g.add(x, alpha=group["weight_decay"])
        v = g.add(m, alpha=group["momentum"])
        step = g.add(v, alpha=group["momentum"])
        if x is parameter:
            parameter.add_(step, alpha=-lr)
        else:
            parameter.copy_(x.add_(step, alpha=-lr))  # rounded once

    def _state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            dtype = torch.float32 if parameter.dtype in LOW_PRECISION else parameter.dtype
            with torch.inference_mode(False):  # it outlives a user's `with torch.inference_mode()`
                state["m"] = torch.zeros_like(parameter, dtype=dtype)
                state["a"] = parameter.detach().to(dtype, copy=True)
        return state
