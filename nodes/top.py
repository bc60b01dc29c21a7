"""`mesh top`: the whole mesh on one screen, as it changes.

Rules: 1. A thread asks the node and a loop reads keys, so a node that does not answer holds up no
key. 2. However it ends, the terminal is what it was before. 3. Without a terminal the same table is
printed as plain lines.
A frame's trip: Watcher asks -> overview.Look -> frame() -> pieces with a style -> render draws.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import mesh
from nodes import keyboard, output, overview, plot, text, watch
from nodes.overview import SORTS, Layout, Look, Row, Trails

REFRESH_S: Final = 1.0
TICK_S: Final = 0.1
"""How soon a new size of the terminal, or an answer, is seen."""

PLAIN_WIDTH: Final = 100
HISTORIES: Final = 32
"""Of so many nodes the past is asked for; in a larger mesh trails of the others begin now."""

STYLES: Final = {"suspect": "yellow", "dead": "red", "incompatible": "magenta"}
INTERRUPTED: Final = 130
HEAD_LINES, FOOT_LINES = 3, 1


class Order(NamedTuple):
    """What to show, and how."""

    state: str | None
    node: str | None
    sort: str
    every_s: float | None
    as_json: bool
    svg: str | None


def run(order: Order) -> int:
    """Shows the mesh; returns the exit code. Raises MeshError."""
    if order.every_s is not None and not watch.LEAST_S <= order.every_s <= watch.MOST_S:
        raise mesh.UsageError(
            f"--watch {order.every_s:g}: {watch.LEAST_S:g}..{watch.MOST_S:g} seconds"
        )
    path = None if order.svg is None else output.file("--svg", order.svg)
    source = Source(order)
    first = source.look()
    if path is not None:
        return _picture(order, source, first, path)
    if order.as_json or not (watch.on_terminal() and sys.stdin.isatty()):
        return _plain(order, source)
    return _full_screen(order, source, first)


class Source:
    """Asks the node, whichever it is by then: it may have been started again."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def look(self) -> Look:
        """One moment. Raises MeshError."""
        return overview.look(self._ask("status"), self._ask("peers"))

    def remembered(self) -> list[dict[str, Any]]:
        """What the nodes themselves kept, so that no trail begins empty."""
        with contextlib.suppress(mesh.MeshError):
            return plot.histories(
                self._order.state,
                self._order.node,
                points=overview.TRAIL_LIMIT,
                most=HISTORIES,
                missed=lambda text: None,
            )
        return []

    def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return mesh.question(op, state=self._order.state, name=self._order.node, **fields)


# ------------------------------------------------------------------------------- without a terminal


def _plain(order: Order, source: Source) -> int:
    trails = Trails()

    def show() -> int:
        seen = source.look()
        trails.follow(seen.rows)
        rows = overview.ordered(seen.rows, order.sort)
        if order.as_json:
            print(json.dumps(overview.as_json(seen, rows)))
            return 0
        ascii = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
        layout = Layout.of(rows, PLAIN_WIDTH)
        if order.every_s is None:
            layout = layout._replace(spark=0)  # a trail of one moment says nothing
        lines = [overview.head(layout)]
        lines += [overview.cells(row, trails, layout, ascii=ascii) for row in rows]
        print("\n".join([*overview.summary(seen), *(" ".join(line).rstrip() for line in lines)]))
        return 0

    if order.every_s is None:
        return show()
    return watch.repeat(show, order.every_s, as_json=order.as_json)


def _picture(order: Order, source: Source, seen: Look, path: Path) -> int:
    from nodes import render

    view, trails = View(sort=order.sort), Trails()
    trails.seed(source.remembered())
    trails.follow(seen.rows)
    lines = frame(seen, trails, view, PLAIN_WIDTH, len(seen.rows) + HEAD_LINES + FOOT_LINES)
    drawn = render.svg(lines, PLAIN_WIDTH, "mesh top")
    try:
        path.write_text(drawn)
    except OSError as error:
        raise mesh.UsageError(f"--svg {order.svg}: {error.strerror}") from None
    return 0


# --------------------------------------------------------------------------------------- the screen


class View:
    """What a person chose."""

    def __init__(self, sort: str) -> None:
        self.sort = sort
        self.turned = False
        self.offset = 0
        """rows above the first that is shown"""

    def press(self, key: str, rows: int, room: int) -> None:
        """A key that sorts or scrolls; others do nothing."""
        by_letter = {sort.letter: name for name, sort in SORTS.items()}
        chosen = by_letter.get(key.lower())
        if chosen is not None:
            self.turned = chosen == self.sort and not self.turned
            self.sort, self.offset = chosen, 0
        steps = {
            keyboard.UP: -1,
            "k": -1,
            keyboard.DOWN: 1,
            "j": 1,
            keyboard.PAGE_UP: -room,
            keyboard.PAGE_DOWN: room,
            " ": room,
            keyboard.HOME: -rows,
            keyboard.END: rows,
        }
        self.offset += steps.get(key, 0)
        self.stay_within(rows, room)

    def stay_within(self, rows: int, room: int) -> None:
        """A screen that grew, or a mesh that shrank, leaves no room empty below the last row."""
        self.offset = max(0, min(self.offset, rows - room))


Line = list[tuple[str, str]]


def frame(
    seen: Look, trails: Trails, view: View, columns: int, lines: int, silence: str = ""
) -> list[Line]:
    """What the screen shows; `silence` says why the figures are old."""
    rows = overview.ordered(seen.rows, view.sort, turned=view.turned)
    layout = Layout.of(rows, columns)
    room = max(lines - HEAD_LINES - FOOT_LINES, 1)
    first, health = overview.summary(seen)
    second = (silence, "bold red") if silence else (health, "yellow" if seen.health else "green")
    titles: Line = []
    for title in overview.head(layout):
        chosen = title.strip() == SORTS[view.sort].title
        titles += [(title, "reverse bold" if chosen else "bold"), (" ", "")]
    view.stay_within(len(rows), room)
    shown = rows[view.offset : view.offset + room]
    drawn = [_line(row, trails, layout, old=bool(silence)) for row in shown]
    empty: list[Line] = [[] for _ in range(room - len(drawn))]
    return [[(first, "bold")], [second], titles, *drawn, *empty, _foot(view, len(rows), room)]


def _line(row: Row, trails: Trails, layout: Layout, *, old: bool) -> Line:
    style = "dim" if old else STYLES.get(row.state, "bold" if row.own else "")
    return [
        piece
        for cell in overview.cells(row, trails, layout)
        for piece in ((cell, style), (" ", ""))
    ]


def _foot(view: View, rows: int, room: int) -> Line:
    keys: Line = [("q", "bold"), (" quit  sort ", "dim")]
    for name, sort in SORTS.items():
        before, letter, after = name.partition(sort.letter)
        style = "reverse" if name == view.sort else "dim"
        if not letter:
            keys += [(sort.letter, "bold"), (":", "dim")]
        keys += [(before, style), (letter, f"bold {style}"), (after, style), (" ", "")]
    if rows > room:
        last = min(view.offset + room, rows)
        keys.append((f" {view.offset + 1}-{last} of {rows} ↑↓", "dim"))
    return keys


class Watcher(threading.Thread):
    """Asks again and again; what it found is read by the loop."""

    def __init__(self, source: Source, first: Look, every_s: float) -> None:
        super().__init__(daemon=True)  # one that waits for a stopped node must not keep us
        self._source = source
        self._every_s = every_s
        self._ended = threading.Event()
        self.latest = first
        self.silence = ""
        self.remembered: list[dict[str, Any]] = []

    def run(self) -> None:
        heard = time.monotonic()
        threading.Thread(target=self._remember, daemon=True).start()
        while not self._ended.wait(self._every_s):
            try:
                self.latest = self._source.look()
                self.silence, heard = "", time.monotonic()
            except mesh.MeshError as error:
                said = str(error).partition("\n")[0]
                self.silence = f"figures are {text.duration(time.monotonic() - heard)} old: {said}"

    def _remember(self) -> None:
        self.remembered = self._source.remembered()

    def end(self) -> None:
        self._ended.set()


def _full_screen(order: Order, source: Source, first: Look) -> int:
    view, trails = View(sort=order.sort), Trails()
    watcher = Watcher(source, first, order.every_s or REFRESH_S)
    watcher.start()
    try:
        with _ends_in_order():
            while (key := _until_key(watcher, trails, view)) == keyboard.SUSPEND:
                os.kill(os.getpid(), signal.SIGSTOP)  # the terminal is the shell's by now
    finally:
        watcher.end()
    return INTERRUPTED if key == keyboard.INTERRUPT else 0


def _until_key(watcher: Watcher, trails: Trails, view: View) -> str:
    """Draws until a key ends it, which is returned."""
    from nodes import render

    with keyboard.keys() as wait, render.screen() as draw:
        shown: Any = None
        while True:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            seen = watcher.latest
            now = (
                seen,
                watcher.silence,
                view.sort,
                view.turned,
                view.offset,
                columns,
                lines,
            )
            if watcher.remembered:
                trails.seed(watcher.remembered)
                watcher.remembered = []
            if now != shown:
                trails.follow(seen.rows)
                draw(frame(seen, trails, view, columns, lines, watcher.silence))
                shown = now
            try:
                pressed = wait(TICK_S)
            except EOFError:
                return "q"
            for key in pressed:
                if key in ("q", "Q", keyboard.INTERRUPT, keyboard.SUSPEND):
                    return key
                room = max(lines - HEAD_LINES - FOOT_LINES, 1)
                view.press(key, len(seen.rows), room)


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal unwind, so that the screen is given back."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
