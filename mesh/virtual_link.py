"""The local socket of a laboratory: a training's end in its thread, a node's end in the loop.

A request's trip: send() -> kept until the program hands the baton back, at the same moment of virtual
time -> receive() of the node's end -> Control.attach(). An event's trip: the node's send() -> a queue
-> the training's receive(), which waits in virtual time. Both are the deployed ends otherwise.
"""

import os
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import trio

from mesh.alarm import Alarm
from mesh.client import ANSWER_S, LocalSocket
from mesh.errors import NodeNotRunning

Wait = Callable[[Callable[[], Awaitable[Any]]], Any]
"""Hands the baton back until something was awaited; returns what came of it."""


class VirtualLines:
    """The node's end. See mesh.lines.Lines."""

    def __init__(self) -> None:
        self.requests: deque[dict[str, Any]] = deque()
        self.events: deque[dict[str, Any]] = deque()
        self.descriptors: list[int] = []
        self.closed = False
        """the training is gone"""
        self.ended = False
        """the node is gone"""
        self._requested = Alarm()
        self._said = Alarm()

    async def receive(self) -> dict[str, Any] | None:
        while not self.requests:
            if self.closed:
                return None
            await self._requested.wait(inf)
        return self.requests.popleft()

    async def send(self, answer: dict[str, Any], descriptor: int | None = None) -> None:
        if self.closed:
            raise OSError("the training is gone")
        if descriptor is not None:
            self.descriptors.append(os.dup(descriptor))
        self.events.append(answer)
        self._said.ring()

    def gone(self) -> bool:
        return False  # a program's end is its connection's

    async def said(self, timeout_s: float) -> None:
        """Waits until the node has said something, or for so long."""
        if not self.events and not self.ended:
            await self._said.wait(trio.current_time() + timeout_s)

    def delivered(self) -> None:
        """What a program sent is here: its node may read it."""
        if self.requests or self.closed:
            self._requested.ring()

    def end(self) -> None:
        """The node's end is closed."""
        self.ended = True
        self._said.ring()


class VirtualLink(LocalSocket):
    """The training's end, without the socket; for the thread of its program."""

    def __init__(self, lines: VirtualLines, wait: Wait, now: Callable[[], float]) -> None:
        self._lines = lines
        self._wait = wait
        self._now = now
        self.descriptors = lines.descriptors

    def now(self) -> float:
        return self._now()

    def send(self, **fields: Any) -> None:
        if self._lines.ended:
            raise NodeNotRunning("the node ended")
        self._lines.requests.append(fields)

    def waits(self) -> bool:
        return bool(self._lines.events) or self._lines.ended

    def receive(self, timeout_s: float | None = ANSWER_S) -> dict[str, Any] | None:
        lines = self._lines
        if not lines.events and not lines.ended and timeout_s:
            self._wait(lambda: lines.said(timeout_s))
        if lines.events:
            return lines.events.popleft()
        if lines.ended:
            raise NodeNotRunning("the node ended")
        return None

    def close(self) -> None:
        self._lines.closed = True
