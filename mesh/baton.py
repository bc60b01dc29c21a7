"""A program that runs as a thread of its own, and only while it holds the baton.

A turn's trip: resume() hands the baton over -> the program runs -> it ask()s for something -> resume()
returns what it asked for -> somebody sees to it, in virtual time -> resume(answer) -> ask() returns.
Rules: 1. Of a holder and its programs one runs at a time, so what they do is decided by who hands the
baton to whom, not by the machine. 2. A program that is stopped unwinds: ask() raises Stopped in it.
"""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

STOP_S: Final = 10.0
"""Real seconds that a stopped program has for its last step and its own cleaning up."""


class Stopped(BaseException):
    """Raised in a program whose time is over. Like SystemExit no error, and for nobody to catch."""


class Program:
    """One thread, and the two locks that pass the baton to it and back."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._question: Any = None
        self._answer: Any = None
        self._stopped = False
        self.error: BaseException | None = None
        """what ended it, if it was not its own end"""
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)

    # ---------------------------------------------------------------------- who holds the baton

    def resume(self, answer: Any = None) -> Any:
        """Lets the program run until it asks for something, and returns that; None: it has ended."""
        self._answer, self._question = answer, None
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        return self._question

    def stop(self) -> None:
        """Ends it where it is. Also after a KeyboardInterrupt in resume(), while it runs on."""
        self._stopped = True
        if self._thread.ident is None:
            return
        if self._go.locked():
            self._go.release()
        self._thread.join(STOP_S)

    # ------------------------------------------------------------------------------ the program

    def ask(self, question: Any) -> Any:
        """Hands the baton back, with what is wanted; returns the answer. For the program's thread."""
        if self._stopped:
            raise Stopped
        self._question = question
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise Stopped
        return self._answer

    def _live(self) -> None:
        self._go.acquire()
        with _Ending(self):
            if not self._stopped:
                self._work()
        self._question = None
        if self._back.locked():  # else an interrupted resume() left it open
            self._back.release()


class _Ending:
    """Keeps what ended a program for whoever started it."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Stopped):
            self._program.error = error
        return True
