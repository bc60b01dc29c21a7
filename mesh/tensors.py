"""A model's floating-point tensors as one flat float32 vector, in place. The other file with torch.

Rules: 1. The order is that of the state dict, tied weights once. 2. Nothing is replaced: optimizer,
model and user keep their tensors. 3. For float16 and bfloat16 `posted` keeps what their rounding
drops, so that averaging by less than one step of the type is not lost, and rounding is never taken
for progress.
"""

from typing import Any

import torch

from mesh.codec import Floats
from mesh.errors import UsageError

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
WIDE = (torch.float32, torch.float64)

PIECE_ENTRIES = 1 << 17
"""Of one thread: three vectors of 512 KiB lie in its second cache, or nearly."""


class Tensors:
    """The averaged part of one model. Flat buffers are float32 (entries,) on the CPU."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises UsageError for a model that cannot be averaged."""
        self.model = model
        self._tensors = _floating(model)
        if not self._tensors:
            raise UsageError("the model has no floating-point parameters: nothing can be averaged")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES:
                raise UsageError(
                    f"{name} is {tensor.dtype}: only {', '.join(DTYPES.values())} can be averaged"
                )
        again = _floating(model)
        for name, tensor in self._tensors.items():
            if again.get(name) is not tensor:
                raise UsageError(f"{name} is made anew by state_dict(): it cannot be averaged")
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.entries = sum(tensor.numel() for tensor in self._tensors.values())
        if not self.entries:
            raise UsageError("the model's tensors are all empty: nothing can be averaged")

    def schema(self) -> list[list[Any]]:
        """[name, shape, dtype] of each tensor."""
        return [
            [name, list(tensor.shape), DTYPES[tensor.dtype]]
            for name, tensor in self._tensors.items()
        ]

    def check(self) -> None:
        """Raises UsageError if the model's layers were replaced, resized, added or removed."""
        now = _floating(self.model)
        for name, tensor in self._tensors.items():
            if now.get(name) is not tensor:
                what = "is gone" if name not in now else "was replaced"
                raise UsageError(
                    f"the model changed: {name} {what} since join(); change layers first, then join"
                )
            if tensor.dtype != self._dtypes[name]:
                raise UsageError(
                    f"the model changed: {name} was {self._dtypes[name]}, is {tensor.dtype}; "
                    "leave the `with` block and join again"
                )
            if tensor.shape != self._shapes[name]:
                raise UsageError(
                    f"the model changed shape: {name} was {tuple(self._shapes[name])}, "
                    f"is {tuple(tensor.shape)}; leave the `with` block and join again"
                )
        if len(now) != len(self._tensors):
            added = next(name for name in now if name not in self._tensors)
            raise UsageError(f"the model changed: {added} was added since join()")

    @torch.no_grad()
    def fill(self, flat: Floats) -> None:
        """flat = x."""
        for tensor, part in self._pairs(flat):
            part.copy_(tensor)

    @torch.no_grad()
    def load(self, flat: Floats) -> None:
        """x = flat."""
        for tensor, part in self._pairs(flat):
            tensor.copy_(part)

    @torch.no_grad()
    def collect(self, posted: Floats) -> None:
        """posted = x, for an offer that is in the model already."""
        for tensor, part in self._pairs(posted):
            if tensor.dtype in WIDE:
                part.copy_(tensor)
            else:
                part.add_(_progress(tensor, part))

    @torch.no_grad()
    def merge(self, posted: Floats, offered: Floats) -> None:
        """x += offered - posted; posted = x."""
        for (tensor, last), (_, offer) in zip(
            self._pairs(posted), self._pairs(offered), strict=True
        ):
            if tensor.dtype in WIDE and tensor.is_cpu and tensor.is_contiguous():
                # Three passes in pieces that stay in the caches: a third less time than one by one.
                length = PIECE_ENTRIES * torch.get_num_threads()
                parts = (torch.split(flat.view(-1), length) for flat in (tensor, last, offer))
                for now, before, given in zip(*parts, strict=True):
                    torch.sub(given, before, out=before)
                    now.add_(before)
                    before.copy_(now)
            elif tensor.dtype in WIDE:
                torch.sub(offer, last, out=last)
                tensor.add_(last.to(tensor.device))
                last.copy_(tensor)
            else:
                torch.add(offer, _progress(tensor, last), out=last)
                tensor.copy_(last)

    @torch.no_grad()
    def copies(self) -> list[torch.Tensor]:
        """The tensors as they are, for restore()."""
        return [tensor.detach().clone() for tensor in self._tensors.values()]

    @torch.no_grad()
    def restore(self, copies: list[torch.Tensor]) -> None:
        for tensor, copy in zip(self._tensors.values(), copies, strict=True):
            tensor.copy_(copy)

    def _pairs(self, buffer: Floats) -> list[tuple[torch.Tensor, torch.Tensor]]:
        flat = torch.from_numpy(buffer)
        pairs, start = [], 0
        for tensor in self._tensors.values():
            end = start + tensor.numel()
            pairs.append((tensor.detach(), flat[start:end].view(tensor.shape)))
            start = end
        return pairs


def _progress(tensor: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What training added to a low-precision tensor since it was rounded from `last`, in float32."""
    now = tensor.to("cpu", torch.float32, copy=True)
    return now.sub_(last.to(tensor.dtype).to(torch.float32))


def _floating(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point entries of the state dict by name; a tied tensor under its first name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_complex():
            raise UsageError(f"{name} is complex: only real numbers can be averaged")
        if not tensor.is_floating_point():
            continue
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        same = storage if tensor.numel() and tensor.data_ptr() else (id(tensor),)
        if same not in seen:
            seen.add(same)
            found[name] = tensor
    return found
