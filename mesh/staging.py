"""Where the CPU computes with tensors that lie on an accelerator: a copy of each, in this machine's memory.

Node and training share flat buffers in memory, so weights of a GPU cross to be averaged. Under CUDA copies
lie in page-locked memory, which a GPU reads and writes at the full speed of its bus, and cross on streams of
their own: while the CPU computes with one tensor, the next comes and the one before goes back.

A hand-over's trip: visiting() queues all copies from the device, and yields each once it is here -> tensors.py
computes in it -> it is queued to go back -> the training's own stream goes on when all are there.
Rules: 1. Imported only for a model that has such tensors. 2. A device without such streams (Apple's mps,
Intel's xpu) takes the same way, and each copy waits.
"""

from collections.abc import Iterable, Iterator

import torch


class _Streams:
    """Those of one GPU: PCIe carries both directions at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """What the training queued so far is computed before anything comes down."""
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        self.down.wait_stream(self.up)  # which reads what is about to be written

    def end(self) -> None:
        """What the training queues from now on sees what went up."""
        torch.cuda.current_stream(self.device).wait_stream(self.up)


class _Staged:
    """One tensor, and its copy here."""

    def __init__(self, tensor: torch.Tensor, streams: _Streams | None) -> None:
        self._there = tensor
        self.here = _copy_of(tensor)
        self._streams = streams
        self._came: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._came = None
        # Of other strides a copy goes through a second one, and would be used before that is full.
        if self._streams is None or self.here.stride() != self._there.stride():
            return
        with torch.cuda.stream(self._streams.down):
            self.here.copy_(self._there, non_blocking=True)
        self._came = self._streams.down.record_event()

    def wait(self) -> None:
        if self._came is None:
            self.here.copy_(self._there)
        else:
            self._came.synchronize()

    def leave(self) -> None:
        if self._streams is None or self._came is None:
            self._there.copy_(self.here)
            return
        with torch.cuda.stream(self._streams.up):
            self._there.copy_(self.here, non_blocking=True)


class Staging:
    """The copies of one model's tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """None: one that the CPU computes with where it lies."""
        self._streams: dict[torch.device, _Streams] = {}
        self._staged = [None if tensor is None else self._staged_of(tensor) for tensor in tensors]

    def visiting(
        self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], *, back: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`pairs` of a tensor and its part of a flat buffer, with the tensors' copies in their places.

        A copy has its tensor's values when it is yielded. Where it is to go `back`, the tensor has
        the copy's when the next pair was asked for. Do not stop on the way.
        """
        try:
            for streams in self._streams.values():
                streams.begin()
            for staged in self._staged:
                if staged is not None:
                    staged.begin()
            for staged, (tensor, part) in zip(self._staged, pairs, strict=True):
                if staged is None:
                    yield tensor, part
                    continue
                staged.wait()
                yield staged.here, part
                if back:
                    staged.leave()
        finally:
            for streams in self._streams.values():
                streams.end()

    def _staged_of(self, tensor: torch.Tensor) -> _Staged:
        device = tensor.device
        if tensor.is_cuda and device not in self._streams:
            self._streams[device] = _Streams(device)
        return _Staged(tensor, self._streams.get(device))


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """An empty one of its type, shape and strides in memory, page-locked for CUDA where that can be had."""
    if tensor.is_cuda:
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:  # no such memory is left: copies work without, more slowly
            pass
    return torch.empty_like(tensor, device="cpu")
