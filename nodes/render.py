"""Live tables for a terminal. The only file that imports rich, and only when it draws."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

Rows = list[list[str]]


def table(title: str, heads: list[str], rows: Rows) -> Table:
    """Numbers to the right, the first column to the left."""
    drawn = Table(title=title, title_justify="left")
    for rank, head in enumerate(heads):
        drawn.add_column(head, justify="right" if rank else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    return drawn


@contextlib.contextmanager
def live(heads: list[str]) -> Iterator[Callable[[str, Rows], None]]:
    """Yields draw(title, rows). On standard error; without a terminal only the titles are printed."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def say(title: str, rows: Rows) -> None:
            nonlocal last
            if title != last:
                console.print(title, highlight=False)
            last = title

        yield say
        return
    with Live(console=console, refresh_per_second=8) as screen:

        def draw(title: str, rows: Rows) -> None:
            screen.update(table(title, heads, rows))

        yield draw


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields draw(text, done bytes, of bytes): a bar on standard error that is gone afterwards.

    Without a terminal each text is printed once.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def note(said: str, done: int, of: int) -> None:
            nonlocal last
            if said != last:
                console.print(said, highlight=False, markup=False, soft_wrap=True)
            last = said

        yield note
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=None)

        def draw(said: str, done: int, of: int) -> None:
            shown.update(task, description=said, completed=done, total=of or None)

        yield draw


def say(line: str) -> None:
    """One line on standard error."""
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


Line = list[tuple[str, str]]
"""Pieces of one line: text, and its style in rich's words."""


@contextlib.contextmanager
def screen() -> Iterator[Callable[[list[Line]], None]]:
    """Yields draw(lines), which fills the terminal; it is given back as it was."""
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as shown:

        def draw(lines: list[Line]) -> None:
            # Some shells export COLUMNS and LINES, which rich believes even after a resize.
            columns, rows = os.get_terminal_size(console.file.fileno())
            if columns and rows:  # a serial line says neither
                console.size = ConsoleDimensions(columns, rows)
            shown.update(_drawn(lines), refresh=True)

        yield draw


def svg(lines: list[Line], width: int, title: str) -> str:
    """A picture of a terminal that shows these lines."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=width, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(_drawn(lines))
        drawn = console.export_svg(title=title, unique_id="mesh")
    # The fonts that rich names are fetched from elsewhere; whoever looks at this need not be known.
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def _drawn(lines: list[Line]) -> Group:
    """Text, never markup: a node's name may hold brackets."""
    return Group(*(Text.assemble(*line, no_wrap=True, overflow="crop") for line in lines))
