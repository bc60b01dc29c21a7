"""A model's tensors by name: which are averaged, and which are one under two names.

Rules: 1. Names are those of the model itself: torch.compile and DataParallel put theirs before them on one
machine and not on another. 2. Numbers in memory are averaged once, however many tensors show them. 3. What
cannot be averaged is refused by its name, with what to do.
"""

import math
from typing import Any, Final

import numpy as np
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from mesh.errors import UsageError

COMPILED: Final = "_orig_mod."
"""What torch.compile puts before the names of a module that it wraps, wherever that is in the model."""

LARGEST: Final = 1e19
"""Beyond it squares overflow in float32."""

NO_WEIGHT: Final = "if it is no weight, register it with persistent=False"


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model without what wraps it as a whole."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model


def named(model: torch.nn.Module) -> dict[str, Any]:
    """The state dict as it is held, under the model's own names."""
    entries = bare(model).state_dict(keep_vars=True)
    return {name.replace(COMPILED, ""): value for name, value in entries.items()}


def load_named(model: torch.nn.Module, entries: dict[str, Any]) -> None:
    """As load_state_dict(), with names as named() has them."""
    model = bare(model)
    model.load_state_dict(
        {name: entries[name.replace(COMPILED, "")] for name in model.state_dict()}
    )


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are one under two names (tied weights)."""
    if tensor.layout == torch.strided and tensor.numel() and tensor.data_ptr():
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    return (id(tensor),)


def floating(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point tensors of the state dict by name; tied ones under the first name.

    A tensor that shows another's numbers in another order (a transpose) is tied to it. Raises UsageError.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in named(model).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet: run one batch through the model, then join")
        if tensor.is_meta:
            raise UsageError(
                f"{name} has no numbers yet: it is on the meta device; join afterwards"
            )
        if tensor.is_complex():
            raise UsageError(f"{name} is complex: only real numbers can be averaged; {NO_WEIGHT}")
        if not tensor.is_floating_point():
            continue
        if tensor.layout != torch.strided:
            raise UsageError(f"{name} is sparse: it cannot be averaged; {NO_WEIGHT}")
        same = _numbers_of(tensor)
        if same not in seen:
            seen.add(same)
            found[name] = tensor
    return found


def refuse_overlaps(tensors: dict[str, torch.Tensor]) -> None:
    """Raises UsageError where numbers in memory belong to two tensors, or twice to one."""
    ranges = []
    for name, tensor in tensors.items():
        sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
        if any(size > 1 and stride == 0 for size, stride in sizes):
            raise UsageError(f"{name} is expanded: make it a tensor of its own with .clone()")
        if tensor.numel() and (start := tensor.data_ptr()):
            last = sum((size - 1) * stride for size, stride in sizes)
            ranges.append((start, start + (last + 1) * tensor.element_size(), name))
    open_ranges: list[tuple[int, str]] = []
    for start, end, name in sorted(ranges):
        open_ranges = [(until, other) for until, other in open_ranges if until > start]
        for _, other in open_ranges:
            if _share_numbers(tensors[other], tensors[name]):
                raise UsageError(
                    f"{other} and {name} share a part of their numbers, which would be averaged "
                    "twice: make one from the other in forward(), or with .clone()"
                )
        open_ranges.append((end, name))


def refuse_not_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raises UsageError for what is not finite, or too large to be averaged."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        least, most = (float(bound) for bound in tensor.detach().aminmax())
        if least >= -LARGEST and most <= LARGEST:  # not so where it is NaN
            continue
        what = "NaN" if math.isnan(least) else f"{least if least < -LARGEST else most:.3g}"
        cure = "start from other weights"
        if not isinstance(tensor, torch.nn.Parameter):
            cure = f"what means infinity can be made in forward(); {NO_WEIGHT}"
        raise UsageError(f"{name} has entries of {what}, which cannot be averaged: {cure}")


def _numbers_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors of the same numbers in memory, in whatever order and shape."""
    if not tensor.numel() or not tensor.data_ptr():
        return (id(tensor),)
    if tensor.is_contiguous():
        return (tensor.data_ptr(), tensor.dtype, ((1, tensor.numel()),))
    places: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if places and stride == places[-1][0] * places[-1][1]:
            places[-1] = (places[-1][0], places[-1][1] * size)
        elif size > 1:
            places.append((stride, size))
    return (tensor.data_ptr(), tensor.dtype, tuple(places))


def _share_numbers(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Exactly: columns of one matrix lie between each other, and share nothing."""
    return bool(np.intersect1d(_bytes_of(first), _bytes_of(second)).size)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where its numbers begin."""
    at = np.full(1, tensor.data_ptr(), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = np.arange(size, dtype=np.int64) * (stride * tensor.element_size())
        at = np.add.outer(at, step).reshape(-1)
    return at
