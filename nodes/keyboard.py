"""Single keys from a terminal, while a program fills its screen.

Rules: 1. However the block is left, the terminal is what it was before. 2. Ctrl-C and Ctrl-Z come as
keys, so that the screen can be given back first.
"""

import contextlib
import os
import re
import select
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Final

INTERRUPT, SUSPEND = "\x03", "\x1a"
UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END = "up", "down", "page up", "page down", "home", "end"
SEQUENCES: Final = {
    "\x1b[A": UP,
    "\x1bOA": UP,
    "\x1b[B": DOWN,
    "\x1bOB": DOWN,
    "\x1b[5~": PAGE_UP,
    "\x1b[6~": PAGE_DOWN,
    "\x1b[H": HOME,
    "\x1b[1~": HOME,
    "\x1bOH": HOME,
    "\x1b[F": END,
    "\x1b[4~": END,
    "\x1bOF": END,
}
"""What terminals send for keys without a character."""

KEY: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO.|.", re.DOTALL)


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], list[str]]]:
    """Yields wait(seconds) -> the keys that were pressed; fewer seconds if one is. Raises EOFError
    when the terminal is gone."""
    source = sys.stdin.fileno()
    before = termios.tcgetattr(source)
    changed = termios.tcgetattr(source)
    changed[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
    changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0

    def wait(seconds: float) -> list[str]:
        if not select.select([source], [], [], seconds)[0]:
            return []
        data = os.read(source, 1024)
        if not data:
            raise EOFError("the terminal is gone")
        pressed = KEY.findall(data.decode(errors="replace"))
        return [SEQUENCES.get(key, key) for key in pressed]

    termios.tcsetattr(source, termios.TCSADRAIN, changed)
    try:
        yield wait
    finally:
        termios.tcsetattr(source, termios.TCSAFLUSH, before)
