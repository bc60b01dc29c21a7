"""`-w/--watch`: one command's answer again and again.

Rules: 1. A frame is one write, and changes nothing of the terminal that would have to be undone: so
Ctrl-C is safe at any time. 2. In a pipe answers follow each other, and the end of its reader is
noticed at once. 3. An error ends it with that error's exit code.
A frame's way: the command prints -> the text is kept back -> drawn over the frame before.
"""

import contextlib
import io
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Final

import mesh
from nodes import text

DEFAULT_S: Final = 2.0
LEAST_S, MOST_S = 0.1, 86400.0
UNHEALTHY: Final = 4
"""Exit code of an answer that a person still wants to see again."""


def repeat(command: Callable[[], int], every_s: float, *, as_json: bool) -> int:
    """Runs `command` every so many seconds, until it fails or whoever reads goes. Raises MeshError."""
    if not LEAST_S <= every_s <= MOST_S:
        raise mesh.UsageError(f"--watch {every_s:g}: {LEAST_S:g}..{MOST_S:g} seconds")
    redraws = not as_json and on_terminal()
    frames = 0
    while True:
        due = time.monotonic() + every_s
        with contextlib.redirect_stdout(io.StringIO()) as kept:
            code = command()
        said = kept.getvalue().rstrip("\n")
        if redraws:
            size = os.get_terminal_size(sys.stdout.fileno())
            sys.stdout.write(frame(said.splitlines(), size, first=not frames))
        else:
            gap = "\n" if frames and not as_json else ""
            print(f"{gap}{said}")
        sys.stdout.flush()
        frames += 1
        if code not in (0, UNHEALTHY) or wait(due - time.monotonic()):
            return code


def on_terminal() -> bool:
    """Whether standard output is a terminal on which a picture can be drawn over another."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def wait(seconds: float) -> bool:
    """Waits; True at once if nobody reads standard output any more."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # it may be a stand-in for a file
        poll.register(sys.stdout.fileno(), 0)  # an error of it is reported unasked
    return any(
        seen & (select.POLLERR | select.POLLHUP | select.POLLNVAL)
        for _, seen in poll.poll(1000 * max(seconds, 0.0))
    )


def frame(lines: list[str], size: os.terminal_size, *, first: bool) -> str:
    """Draws from the top left corner; what is too long or too high is cut."""
    columns, rows = size
    if len(lines) >= rows > 2:
        left = len(lines) - (rows - 2)
        lines = [*lines[: rows - 2], f"... {left} more lines: make the terminal higher"]
    # A width that this terminal counts otherwise must not break a line: it does not wrap meanwhile.
    body = "".join(f"{text.fitted(line, columns).rstrip()}\x1b[K\n" for line in lines)
    start = "\x1b[2J" if first else ""
    return f"{start}\x1b[H\x1b[?7l{body}\x1b[?7h\x1b[J"
