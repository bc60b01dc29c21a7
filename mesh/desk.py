"""Where questions between nodes leave this process and come in; core/questions.py finds their way.

Rules: 1. Whoever asks gets an answer or a MeshError in the time it gave, whatever the mesh does. 2.
What another node asks is performed in a task of its own, bounded in number by the core. 3. An answer
is text here: only the program that asked reads it.
A question's trip: ask() -> Ask -> ... -> Told -> told() -> ask() returns. Another's: Perform ->
perform() -> `answerer` -> Performed.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final

import trio

from mesh.core import events as ev
from mesh.core.for_people import PAGES_LIMIT, PIECE_CHARACTERS, PIECES_LIMIT, Argument
from mesh.core.messages import NodeId
from mesh.errors import MeshError, NodeTimeout

TEXT_LIMIT: Final = PAGES_LIMIT * PIECES_LIMIT * PIECE_CHARACTERS
"""Characters of an answer."""

TOO_LONG: Final = json.dumps(
    {
        "ok": False,
        "error": {
            "code": "error",
            "message": "the answer is too long for the way through the mesh",
        },
    }
)

Answerer = Callable[[ev.Perform], Awaitable[str]]


@dataclass(slots=True)
class _Open:
    done: trio.Event = field(default_factory=trio.Event)
    told: ev.Told | None = None


class Desk:
    """One node's."""

    def __init__(self, emit: Callable[[ev.Event], Awaitable[None]], rng: Random) -> None:
        self._emit = emit
        self._rng = rng
        self._open: dict[int, _Open] = {}
        self.answerer: Answerer | None = None
        """answers what other nodes ask; without one they are told that nobody does"""
        self.afterwards: Callable[[], None] | None = None
        """called when the answer that is being given is on its way"""

    async def ask(
        self, target: NodeId, op: str, arguments: Mapping[str, object], within_s: float
    ) -> ev.Told:
        """What `target` answers, as JSON text. Raises NodeTimeout, or MeshError if it is gone."""
        number = self._rng.getrandbits(62)
        self._open[number] = slot = _Open()
        try:
            await self._emit(
                ev.Ask(
                    number=number,
                    target=target,
                    op=op,
                    arguments=tuple(
                        Argument(name=name, value=str(value)) for name, value in arguments.items()
                    ),
                    within_s=within_s,
                )
            )
            await slot.done.wait()
        finally:
            del self._open[number]
        assert slot.told is not None
        match slot.told.failure:
            case "":
                return slot.told
            case "timeout":
                raise NodeTimeout(
                    f"no answer through the mesh within {within_s:g} s: "
                    "`mesh peers` shows whether it is alive and reached"
                )
            case "gone":
                raise MeshError("it is dead or left: `mesh peers` says why")
            case failure:
                raise MeshError(failure)

    def told(self, told: ev.Told) -> None:
        """The core knows what came of a question."""
        slot = self._open.get(told.number)
        if slot is not None:
            slot.told = told
            slot.done.set()

    async def perform(self, question: ev.Perform) -> None:
        """Answers another node."""
        if question.op == "echo":
            text = "{}"
        elif self.answerer is None:
            text = json.dumps(
                {"ok": False, "error": {"code": "error", "message": "nobody answers there"}}
            )
        else:
            text = await self.answerer(question)
        text = text if len(text) <= TEXT_LIMIT else TOO_LONG
        await self._emit(ev.Performed(asker=question.asker, number=question.number, text=text))
        if self.afterwards is not None:
            self.afterwards()
