"""A model's floating-point tensors as one flat float32 vector, in place.

Rules: 1. The order is that of the state dict, tied weights once. 2. Nothing is replaced: optimizer,
model and user keep their tensors. 3. For float16 and bfloat16 `posted` keeps what their rounding
drops, so that averaging by less than one step of the type is not lost, and rounding is never taken
for progress. 4. BatchNorm's variances lie in flat buffers as second moments (batchnorm.py), so that
plain averages of them are right.
"""

import operator
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mesh.arrays import Floats
from mesh.batchnorm import RunningStatistics, running_statistics
from mesh.core.schema import NAME_LIMIT
from mesh.dtypes import MOMENT
from mesh.errors import UsageError
from mesh.named_tensors import NO_WEIGHT, bare, floating, refuse_not_finite, refuse_overlaps
from mesh.spectral import directions, set_lengths

if TYPE_CHECKING:
    from mesh.staging import Staging

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
WIDE = (torch.float32, torch.float64)

Pair = tuple[torch.Tensor, torch.Tensor]
"""A tensor, and its part of a flat buffer."""

PIECE_ENTRIES = 1 << 17
"""Of one thread: three vectors of 512 KiB lie in its second cache, or nearly."""


class Tensors:
    """The averaged part of one model. Flat buffers are float32 (entries,) on the CPU."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises UsageError for a model that cannot be averaged."""
        self.model = model
        self._kept_parts: dict[int, list[torch.Tensor]] = {}
        """of flat buffers that live as long as a session, by id"""
        self._seen: tuple[dict[str, Any], list[tuple[Any, ...]]] = {}, []
        """the state dict that check() found good, and _facts() of it"""
        self._hold(floating(model))
        if not self._tensors:
            raise UsageError("the model has no floating-point parameters: nothing can be averaged")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPES:
                raise UsageError(
                    f"{name} is {tensor.dtype}: only {', '.join(DTYPES.values())} can be averaged; "
                    f"{NO_WEIGHT}"
                )
            if len(name) > NAME_LIMIT:
                raise UsageError(
                    f"{name[:60]}... is a name of {len(name)} characters: {NAME_LIMIT} at most"
                )
        again = floating(model)
        for name, tensor in self._tensors.items():
            if again.get(name) is not tensor:
                raise UsageError(f"{name} is made anew by state_dict(): it cannot be averaged")
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.entries = sum(tensor.numel() for tensor in self._tensors.values())
        if not self.entries:
            raise UsageError("the model's tensors are all empty: nothing can be averaged")

    def _hold(self, tensors: dict[str, torch.Tensor]) -> None:
        refuse_overlaps(tensors)
        self._tensors = tensors
        held = {id(tensor) for tensor in tensors.values()}
        self._statistics = [
            layer
            for layer in running_statistics(self.model)
            if id(layer.mean) in held and id(layer.variance) in held
        ]
        self._in_statistics = {
            id(tensor) for layer in self._statistics for tensor in (layer.mean, layer.variance)
        }
        self._directions = directions(self.model)
        self._devices: list[torch.device] = []
        self._staging: Staging | None = None

    @property
    def has_batchnorm(self) -> bool:
        """Whether a layer's running statistics are averaged."""
        return bool(self._statistics)

    @property
    def takes_differences(self) -> bool:
        """Whether add() will do: what it adds to holds all that `posted` does."""
        return not self._statistics and all(dtype in WIDE for dtype in self._dtypes.values())

    def schema(self) -> list[list[Any]]:
        """[name, shape, dtype] of each tensor, as its numbers lie in a flat buffer (dtypes.py)."""
        moments = {id(layer.variance) for layer in self._statistics}
        return [
            [name, list(tensor.shape), DTYPES[tensor.dtype] + MOMENT * (id(tensor) in moments)]
            for name, tensor in self._tensors.items()
        ]

    def check_finite(self) -> None:
        """Raises UsageError for what no mesh would take."""
        refuse_not_finite(self._tensors)

    def check(self) -> None:
        """Raises UsageError if the model's layers were replaced, resized, added or removed.

        A buffer that forward() makes anew is followed.
        """
        if self._is_as_seen(entries := bare(self.model).state_dict(keep_vars=True)):
            return
        now = floating(self.model)
        for name, tensor in self._tensors.items():
            if now.get(name) is not tensor:
                if _follows(now.get(name), tensor):
                    continue
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
        if any(now[name] is not tensor for name, tensor in self._tensors.items()):
            self._hold({name: now[name] for name in self._tensors})
        self._seen = entries, self._facts(entries)

    def _is_as_seen(self, entries: dict[str, Any]) -> bool:
        """Whether the state dict is, object for object, that of the last check(): a third of the time of
        finding out what is in it."""
        seen, facts = self._seen
        return (
            list(entries) == list(seen)
            and all(map(operator.is_, entries.values(), seen.values()))
            and self._facts(entries) == facts
        )

    @staticmethod
    def _facts(entries: dict[str, Any]) -> list[tuple[Any, ...]]:
        """What assigning to .data changes in a tensor that stays the same object."""
        tensors = [value for value in entries.values() if isinstance(value, torch.Tensor)]
        return [
            (t.data_ptr() if t.layout is torch.strided else 0, t.dtype, t.shape) for t in tensors
        ]

    @torch.no_grad()
    def fill(self, flat: Floats) -> None:
        """flat = x."""
        for tensor, part in self._here(flat):
            part.copy_(tensor)
        for layer, mean, second in self._moments(flat):
            for part, value in zip((mean, second), layer.moments(), strict=True):
                part.copy_(value)

    @torch.no_grad()
    def load(self, flat: Floats) -> None:
        """x = flat."""
        for tensor, part in self._pairs(flat):
            tensor.copy_(part)
        for layer, mean, second in self._moments(flat):
            layer.write(mean, second)
        set_lengths(self._directions)

    @torch.no_grad()
    def collect(self, posted: Floats) -> None:
        """posted = x, of a model that holds the last offer."""
        for tensor, part in self._here(posted):
            if tensor.dtype in WIDE:
                part.copy_(tensor)
            else:
                part.add_(_progress(tensor, part))
        for layer, mean, second in self._moments(posted):
            for part, value in zip((mean, second), layer.carried(mean, second), strict=True):
                part.copy_(value)
            layer.write(mean, second)  # or what posted keeps would be taken for progress next time

    @torch.no_grad()
    def merge(self, posted: Floats, offered: Floats) -> None:
        """x += offered - posted. What `posted` holds then is collect()'s to know."""
        length = PIECE_ENTRIES * torch.get_num_threads()
        for (tensor, last), (_, offer) in zip(
            self._here(posted, back=True), self._pairs(offered), strict=True
        ):
            if tensor.dtype in WIDE:
                for now, before, given in _pieces(tensor, last, offer, length):
                    now.add_(torch.sub(given, before, out=before))
            else:
                torch.add(offer, _progress(tensor, last), out=last)
                tensor.copy_(last)
        for (layer, *last_two), (_, *offers) in zip(
            self._moments(posted), self._moments(offered), strict=True
        ):
            added = layer.progress(*last_two)
            for last, offer, value in zip(last_two, offers, added, strict=True):
                last.copy_(value.add_(offer))
            layer.write(*last_two)
        set_lengths(self._directions)  # at the next hand-over a part of the training's progress

    @torch.no_grad()
    def add(self, difference: Floats) -> None:
        """x += difference, which is offered - posted: merge() in half the time, for a model that
        `takes_differences`. collect() next."""
        for tensor, part in self._here(difference, back=True):
            tensor.add_(part)
        set_lengths(self._directions)

    @torch.no_grad()
    def copies(self) -> list[torch.Tensor]:
        """The tensors as they are, for restore(); BatchNorm's counters of batches too."""
        return [tensor.detach().clone() for tensor in self._kept()]

    @torch.no_grad()
    def restore(self, copies: list[torch.Tensor]) -> None:
        for tensor, copy in zip(self._kept(), copies, strict=True):
            tensor.copy_(copy)

    def _kept(self) -> list[torch.Tensor]:
        counters = [layer.batches for layer in self._statistics if layer.batches is not None]
        return [*self._tensors.values(), *counters]

    def _parts(self, buffer: Floats) -> Iterable[Pair]:
        """(tensor, its part of the buffer)."""
        parts = self._kept_parts.get(id(buffer))
        if parts is None:
            shapes = self._shapes.values()
            with torch.inference_mode(False):  # they outlive a user's `with torch.inference_mode()`
                flat = torch.from_numpy(buffer[:])
                split = torch.split(flat, [shape.numel() for shape in shapes])
                parts = [part.view(shape) for part, shape in zip(split, shapes, strict=True)]
            if not buffer.flags.owndata:  # shared memory, which these parts hold, but not `buffer`
                self._kept_parts[id(buffer)] = parts
                weakref.finalize(buffer, self._kept_parts.pop, id(buffer)).atexit = False
        return zip(self._tensors.values(), parts, strict=True)

    def _here(self, buffer: Floats, *, back: bool = False) -> Iterable[Pair]:
        """_pairs(), but of tensors that lie elsewhere their copies in memory (see Staging)."""
        tensors = [t for t in self._tensors.values() if id(t) not in self._in_statistics]
        devices = [tensor.device for tensor in tensors]
        if devices != self._devices:  # the first time, and where a user moved the model
            self._devices, self._staging = devices, None
            away = [tensor if elsewhere(tensor) else None for tensor in tensors]
            if any(tensor is not None for tensor in away):
                from mesh.staging import Staging

                self._staging = Staging(away)
        pairs = self._pairs(buffer)
        return pairs if self._staging is None else self._staging.visiting(pairs, back=back)

    def _pairs(self, buffer: Floats) -> list[Pair]:
        """(tensor, its part) of everything that lies in the buffer as it is."""
        parts = self._parts(buffer)
        return [(t.detach(), part) for t, part in parts if id(t) not in self._in_statistics]

    def _moments(
        self, buffer: Floats
    ) -> list[tuple[RunningStatistics, torch.Tensor, torch.Tensor]]:
        """(layer, its part for the mean, its part for the second moment)."""
        if not self._statistics:
            return []
        parts = {id(tensor): part for tensor, part in self._parts(buffer)}
        return [(la, parts[id(la.mean)], parts[id(la.variance)]) for la in self._statistics]


def elsewhere(tensor: torch.Tensor) -> bool:
    """Whether the CPU cannot compute with it where it lies."""
    return not tensor.is_cpu


def _follows(now: torch.Tensor | None, before: torch.Tensor) -> bool:
    """Whether a buffer took another's place, of which nobody but the model holds anything."""
    if now is None or isinstance(now, torch.nn.Parameter) or isinstance(before, torch.nn.Parameter):
        return False
    return (now.shape, now.dtype, now.device) == (before.shape, before.dtype, before.device)


def _pieces(
    tensor: torch.Tensor, last: torch.Tensor, offer: torch.Tensor, length: int
) -> Iterable[tuple[torch.Tensor, ...]]:
    """Two passes in pieces that stay in the caches take a third less time than one by one."""
    if tensor.numel() <= length or not tensor.is_contiguous():
        return [(tensor, last, offer)]
    parts = (torch.split(flat.view(-1), length) for flat in (tensor, last, offer))
    return zip(*parts, strict=True)


def check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises UsageError for one that was made of another model's parameters."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held and not any(id(p) in held for p in model.parameters()):
        raise UsageError(
            "the optimizer holds none of this model's parameters: make it from model.parameters() "
            "after the model is final"
        )


def _progress(tensor: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """What training added to a low-precision tensor since it was rounded from `last`, in float32."""
    now = tensor.to("cpu", torch.float32, copy=True)
    return now.sub_(last.to(tensor.dtype).to(torch.float32))
