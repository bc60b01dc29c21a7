"""`mesh shell`: the commands without typing `mesh`, or Python with a node at hand.

Rules: 1. A line goes through the same parser as a command of the shell, so each means the same.
2. No mistake ends it: Ctrl-C clears the line, Ctrl-D leaves. 3. What was typed is kept in the state
directory, for this user only. 4. Python runs on this side: nothing that is sent to a node is code.
A line's trip: readline -> shlex -> the command line's own main() -> its exit code is kept.
"""

import cmd
import code
import contextlib
import os
import readline
import rlcompleter
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import mesh
from nodes import grammar

HISTORY_FILE, PYTHON_HISTORY_FILE = "shell_history", "python_history"
SECRET: Final = "mesh1-"
"""How a token begins: whoever joined with one does not keep it, so neither does the history."""

HISTORY_LINES: Final = 1000
AT_HAND: Final = ("status", "peers", "runs", "events", "logs", "history")
LEAVING: Final = ("exit", "quit", "EOF")
USAGE: Final = 2


def run(
    main: Callable[[Sequence[str]], int],
    known: grammar.Grammar,
    state: Path,
    given: Mapping[str, str],
) -> int:
    """Reads lines until the end of input; returns the exit code of the last command. `given`: flags,
    with their values, that every line has which knows them and does not say otherwise."""
    lines = Lines(main, known, given)
    with _history(state / HISTORY_FILE, lines.typed):
        if lines.typed:
            readline.set_completer_delims(" \t\n")
        while True:
            try:
                lines.cmdloop()
                return lines.code
            except KeyboardInterrupt:
                print()  # the line that was begun is given up
                lines.intro = None


class Lines(cmd.Cmd):
    """The prompt."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        known: grammar.Grammar,
        given: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._main = main
        self._known = known
        self._given = given
        self.code = 0
        self.typed = sys.stdin.isatty()
        self.prompt = "mesh> " if self.typed else ""
        self.use_rawinput = self.typed
        self.intro = (
            "commands as behind `mesh`; help lists them, Ctrl-D leaves" if self.typed else None
        )

    def onecmd(self, line: str) -> bool:
        """Runs a line; True ends the loop. (Of cmd.Cmd only its reading of lines is used.)"""
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            print(f"mesh: {error}", file=sys.stderr)
            self.code = USAGE
            return False
        if words[:1] == ["mesh"]:
            words = words[1:]  # a habit of the fingers
        if not words:
            return False
        if words[0] in LEAVING:
            if words[0] == "EOF" and self.typed:
                print()
            return True
        if words[0] in ("help", "?"):
            words = [*words[1:], "--help"]
        self.code = self._run(words)
        return False

    def _run(self, words: list[str]) -> int:
        if words[0] == "shell":
            print("mesh: this is the shell already", file=sys.stderr)
            return USAGE
        try:
            return self._main([words[0], *self._added(words), *words[1:]])
        except SystemExit as ended:  # argparse has printed its usage, or the help
            return ended.code if isinstance(ended.code, int) else 0
        except OSError as error:
            print(f"mesh: {error}", file=sys.stderr)
            return 1

    def _added(self, words: list[str]) -> list[str]:
        command = self._known.commands.get(words[0])
        added: list[str] = []
        for flag in command.flags if command is not None else ():
            value = next((v for f, v in self._given.items() if f in flag.spellings), None)
            said = any(word.partition("=")[0] in flag.spellings for word in words[1:])
            if value is not None and not said:
                added += [flag.spellings[0], value]
        return added

    def completenames(self, text: str, *ignored: Any) -> list[str]:
        """For the first word."""
        return [
            f"{name} " for name in (*self._known.commands, "help", "exit") if name.startswith(text)
        ]

    def completedefault(self, *ignored: Any) -> list[str]:
        """For the words behind it: (text, line, begin, end)."""
        text, line, begin, _ = ignored
        words = line[:begin].split()
        offered = grammar.candidates(self._known, words, text)
        return [f"{shlex.quote(word)} " for word in offered]  # a node's name may hold anything


def python(state: str | None, node: str | None) -> int:
    """An interactive Python that can ask this machine's node."""
    at_hand = Questions(state, node).names()
    readline.set_completer(rlcompleter.Completer(at_hand).complete)
    readline.parse_and_bind("tab: complete")
    listed = ", ".join(f"{name}()" for name in sorted(at_hand) if name != "mesh")
    path = mesh.state_directory(state) / PYTHON_HISTORY_FILE
    with _history(path, sys.stdin.isatty()):
        code.interact(
            banner=f"gossipmesh {mesh.__version__}, Python {sys.version.split()[0]}: mesh, {listed}\n"
            "Each answers what `mesh NAME --json` prints, as a dict; node='pi4' asks another.",
            local=at_hand,
            exitmsg="",
        )
    return 0


class Questions:
    """Functions that ask a node; each looks it up anew, so a restart of it disturbs nobody."""

    def __init__(self, state: str | None, node: str | None) -> None:
        self._state = state
        self._node = node

    def ask(self, op: str, *, node: str | None = None, **fields: Any) -> dict[str, Any]:
        """Any question that a node knows; `node` names another of the mesh."""
        answer = mesh.question(op, state=self._state, name=node or self._node, **fields)
        answer.pop("ok", None)
        return answer

    def names(self) -> dict[str, Any]:
        """What Python finds at hand."""
        return {"mesh": mesh, "ask": self.ask} | {op: partial(self.ask, op) for op in AT_HAND}


@contextlib.contextmanager
def _history(path: Path, typed: bool) -> Iterator[None]:
    """What was typed before, and at the end what was typed now; nowhere where no node ever was."""
    if not typed or not path.parent.is_dir():
        yield
        return
    readline.clear_history()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        for index in reversed(range(readline.get_current_history_length())):
            if SECRET in (readline.get_history_item(index + 1) or ""):  # it counts from 1
                readline.remove_history_item(index)  # and this one from 0
        readline.set_history_length(HISTORY_LINES)
        before = os.umask(0o177)
        with contextlib.suppress(OSError):  # a full disk takes the history only
            readline.write_history_file(path)
        os.umask(before)
