"""BatchNorm's running statistics as the mesh averages them: those of all nodes' data together.

Variances do not average one by one: where the means of two nodes differ, their data together vary
more. With weights w and 1 - w

    mean = w mean_1 + (1 - w) mean_2
    var  = w var_1 + (1 - w) var_2 + w (1 - w) (mean_1 - mean_2)^2

The second moment s = var + mean^2 averages plainly, and (mean, s) averaged plainly give exactly this.
So the flat buffers hold s in the place of running_var: running_var -> moments() -> posted -> exchanges
-> offered -> write() -> running_var = s - mean^2.

Rules: 1. Flat buffers are float32, the arithmetic between is float64: s - mean^2 cancels. 2. As with
low-precision weights, `posted` keeps what writing drops, and progress is measured from what was
written: neither rounding nor the floor under a variance is taken for progress. 3. The counter of
batches is an integer: it stays local.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from mesh.dtypes import variance_of
from mesh.errors import UsageError

ADVICE: Final = (
    "the model has BatchNorm: its running statistics are averaged, but on uneven data its batches "
    "differ from node to node; GroupNorm survives uneven data (docs/momentum.md)"
)

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningStatistics:
    """Those of one BatchNorm layer: the layer's own buffers."""

    mean: torch.Tensor
    variance: torch.Tensor
    batches: torch.Tensor | None
    """num_batches_tracked"""

    def moments(self) -> Pair:
        """(mean, s), float64 on the CPU."""
        return _moments(self.mean, self.variance)

    def write(self, mean: torch.Tensor, s: torch.Tensor) -> None:
        """The layer's statistics from (mean, s) of a flat buffer."""
        for tensor, value in zip((self.mean, self.variance), self._rounded(mean, s), strict=True):
            tensor.copy_(value)

    def progress(self, mean: torch.Tensor, s: torch.Tensor) -> Pair:
        """What training added to (mean, s) since they were written from a flat buffer, float64."""
        now, then = self.moments(), _moments(*self._rounded(mean, s))
        return now[0] - then[0], now[1] - then[1]

    def carried(self, mean: torch.Tensor, s: torch.Tensor) -> Pair:
        """(mean, s) with progress() added, float64; where they are not finite, what the layer holds."""
        now, then = self.moments(), _moments(*self._rounded(mean, s))
        return _over(mean, now[0], then[0]), _over(s, now[1], then[1])

    def _rounded(self, mean: torch.Tensor, s: torch.Tensor) -> Pair:
        """(mean, variance) in the layer's own type, as write() leaves them."""
        variance = torch.from_numpy(variance_of(mean.numpy(), s.numpy()))
        return mean.to(self.mean.dtype), variance.to(self.variance.dtype)


def _over(kept: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    return torch.where(kept.isfinite(), now - then + kept, now)


def _moments(mean: torch.Tensor, variance: torch.Tensor) -> Pair:
    first = mean.detach().to("cpu", copy=True).double()  # double() alone may be the buffer itself
    return first, variance.detach().cpu().double() + first.square()


def running_statistics(model: torch.nn.Module) -> list[RunningStatistics]:
    """Of every BatchNorm layer that keeps them; a layer that is used twice, once."""
    return [
        RunningStatistics(mean=mean, variance=variance, batches=module.num_batches_tracked)
        for module in _layers(model)
        if (mean := module.running_mean) is not None
        and (variance := module.running_var) is not None
    ]


def refresh(model: torch.nn.Module, loader: Iterable[Any], batches: int) -> None:
    """Statistics anew from the first `batches` batches of `loader`, with the weights as they are.

    Batches as torch.optim.swa_utils.update_bn takes them: tensors, or lists whose first entry is the
    model's input. Raises UsageError, with the statistics as they were, if there is no batch.
    """
    layers = _layers(model)
    if not layers:
        return
    given = itertools.islice(loader, batches)
    first = next(given, None)
    if first is None:
        raise UsageError("the loader gave no batch: the statistics stay as they are")
    with _put_back(model, layers):
        update_bn(itertools.chain([first], given), model, device=_device(model))


def _layers(model: torch.nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


def _device(model: torch.nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in model.parameters()), None)


@contextlib.contextmanager
def modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Each layer is in its own mode again afterwards: one may be kept in eval() beside others."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _put_back(model: torch.nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """update_bn leaves all layers in one mode, and after an error in any: they go back to their own."""
    momenta = [(layer, layer.momentum) for layer in layers]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        with modes_kept(model):
            yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
