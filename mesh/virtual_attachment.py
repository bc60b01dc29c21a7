"""What join() attaches with in a laboratory: to a virtual node, or, for a reference, to none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from mesh.attachment import ATTACH, BEGIN_S, Attachment
from mesh.checkpoint import CheckpointInfo
from mesh.conditions import ONE_PLACE
from mesh.errors import UsageError
from mesh.laboratory import Laboratory
from mesh.settings import NodeSettings
from mesh.tensors import Tensors
from mesh.virtual_machine import Machine

Work = Callable[[Laboratory, Machine], None]


def inside(work: Work) -> Work:
    """The same program, whose join() finds its laboratory. A thread's context is its own."""

    def attached(laboratory: Laboratory, machine: Machine) -> None:
        kind = VirtualAttachment if laboratory.conditions.meets else ReferenceAttachment
        ATTACH.set(partial(kind, laboratory, machine))
        work(laboratory, machine)

    return attached


class VirtualAttachment(Attachment):
    """A training's tie to its virtual node."""

    def __init__(
        self,
        laboratory: Laboratory,
        machine: Machine,
        tensors: Tensors,
        settings: NodeSettings,
        request: dict[str, Any],
        *,
        resumed: CheckpointInfo | None = None,
    ) -> None:
        if machine.tensors is not None:
            raise UsageError("a virtual machine has one training at a time: leave the first one")
        self._laboratory, self._machine = laboratory, machine
        wanted = {
            "strategy": laboratory.conditions.strategy,
            "codec": laboratory.conditions.codec,
        }
        ordered = {key: value for key, value in wanted.items() if value is not None}
        super().__init__(tensors, settings, {**request, **ordered}, resumed=resumed)

    def _begin(self) -> None:
        self._attach(self._laboratory.link(self._machine), BEGIN_S)
        self._joined()

    def _joined(self) -> None:
        weight = float(self._request["weight"])
        self._laboratory.joined(self._machine, self._tensors, weight)

    def again(self, step: int) -> None:
        pass  # a virtual node lives as long as its training

    def _figures(self) -> dict[str, Any]:
        return self._laboratory.figures(self._machine, self.run)

    def now(self) -> float:
        return self._laboratory.now()

    def sleep(self, seconds: float) -> None:
        self._machine.program.ask(partial(trio.sleep, seconds))

    def stepped(self, loss: float | None) -> None:
        self._laboratory.stepped(self._machine, loss)

    def close(self) -> None:
        self._laboratory.left(self._machine)
        super().close()
        self._machine.tensors = None


class ReferenceAttachment(VirtualAttachment):
    """A training that no node averages."""

    def _begin(self) -> None:
        self.began = "first"
        self._joined()
        self._laboratory.gather(self._machine)

    def stepped(self, loss: float | None) -> None:
        super().stepped(loss)
        if self._laboratory.conditions.strategy == ONE_PLACE:
            self._laboratory.gather(self._machine)
