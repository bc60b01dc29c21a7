"""Spectral normalisation (Miyato et al. 2018) under averaging.

A layer divides its weight by u^T W v, with u and v of length 1 from power iteration. The mean of replicas'
u and v is shorter, so the quotient would be too small, and the weight too large: several times, on uneven
data. In training the next forward() mends it; in eval(), where a model is judged and saved, nobody would.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def directions(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every u and v of the model's layers, of both ways in which torch normalises."""
    return [vector for module in model.modules() for vector in _directions_of(module)]


def set_lengths(vectors: list[torch.Tensor]) -> None:
    """Each has length 1 again. Call without gradients, after the weights came from elsewhere."""
    for vector in vectors:
        torch.nn.functional.normalize(vector, dim=0, out=vector)


def _directions_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    if isinstance(module, _SpectralNorm):
        yield from (value for name, value in module.named_buffers() if name in ("_u", "_v"))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            buffers = dict(module.named_buffers(recurse=False))
            yield from (buffers[f"{hook.name}_{which}"] for which in "uv")
