"""Live tables for a terminal. The only file that imports rich, and only when it draws."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

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
