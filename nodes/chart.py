"""Pictures made of characters: a chart of lines, and a sparkline. Imports the standard library only.

Rules: 1. What comes in is numbers and names, what goes out is text of the width and height asked
for. 2. A value that is not finite, or None, is a gap. 3. Without colour, lines tell themselves apart
by their marks; with colour they are drawn in dots of a quarter of a character.
A point's way: (x, y) -> its place in a grid of dots -> joined with the one before -> characters.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

Point = tuple[float, float | None]

BARS: Final = "▁▂▃▄▅▆▇█"
PLAIN_BARS: Final = "_.-=+*%#"
MARKS: Final = "*o+x#@%&"
COLOURS: Final = (36, 33, 32, 35, 34, 31, 96, 93, 92, 95, 94, 91)
"""ANSI foregrounds, in the order in which lines get them; after the last it begins again."""

DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of Unicode's braille patterns, by row and column of a cell."""

BRAILLE: Final = 0x2800
LEAST_WIDTH, LEAST_HEIGHT = 24, 6


class Series(NamedTuple):
    """One line of a chart; its points in the order of x."""

    name: str
    points: Sequence[Point]


def sparkline(values: Sequence[float | None], width: int, *, ascii: bool = False) -> str:
    """The last `width` values as bars between their least and their greatest."""
    bars = PLAIN_BARS if ascii else BARS
    shown = [finite(value) for value in values[-width:]]
    known = [value for value in shown if value is not None]
    if not known:
        return " " * width
    low, high = min(known), max(known)
    span = high - low
    drawn = "".join(
        " "
        if value is None
        else bars[round((value - low) / span * (len(bars) - 1)) if span > 0 else 0]
        for value in shown
    )
    return drawn.rjust(width)


def chart(
    series: Sequence[Series],
    *,
    width: int = 72,
    height: int = 16,
    title: str = "",
    x_label: str = "",
    log: bool = False,
    colour: bool = False,
    ascii: bool = False,
) -> str:
    """Lines over one pair of axes; `width` and `height` count characters, labels and names included.

    `log`: the y axis is logarithmic; values of 0 and less are gaps then. `colour`: with ANSI escapes.
    `ascii`: nothing beyond ASCII, for terminals of another encoding.
    """
    width, height = max(width, LEAST_WIDTH), max(height, LEAST_HEIGHT)
    lines = [_Line.of(one, log=log) for one in series]
    known = [point for line in lines for point in line.points if point is not None]
    names = [one.name for one in series]
    # Of a hundred names as many as leave room for the lines.
    legend = _legend(names, width, max(1, height // 4), colour=colour, ascii=ascii)
    head = [title[:width]] if title else []
    if not known:
        return "\n".join([*head, "(nothing to draw yet)", *legend])
    rows = max(height - len(head) - len(legend) - 2, 2)
    frame = _Frame.around(known, log=log)
    labels = frame.y_labels(rows)
    margin = max(len(label) for label in labels)
    columns = max(width - margin - 2, 4)
    fine = not ascii and (colour or len(series) == 1)
    cells = _dots(lines, frame, columns, rows) if fine else _marks(lines, frame, columns, rows)
    wall, corner, floor = ("|", "+", "-") if ascii else ("│", "└", "─")
    body = []
    for label, row in zip(labels, cells, strict=True):
        drawn = "".join(
            _painted("".join(mark for mark, _ in same), owner, colour)
            for owner, same in itertools.groupby(row, key=lambda cell: cell[1])
        )
        body.append(f"{label.rjust(margin)} {wall}{drawn}".rstrip())
    return "\n".join(
        [
            *head,
            *body,
            " " * (margin + 1) + corner + floor * columns,
            " " * (margin + 2) + frame.x_labels(columns, x_label),
            *legend,
        ]
    )


class _Line(NamedTuple):
    """Points as they are drawn; None where the line is interrupted."""

    points: list[tuple[float, float] | None]

    @classmethod
    def of(cls, series: Series, *, log: bool) -> "_Line":
        points: list[tuple[float, float] | None] = []
        for x, y in series.points:
            value = finite(y)
            if value is None or not math.isfinite(x) or (log and value <= 0):
                points.append(None)
            else:
                points.append((x, math.log10(value) if log else value))
        return cls(points)


class _Frame(NamedTuple):
    """What the axes span; y in the unit that is drawn, its logarithm where `log`."""

    left: float
    right: float
    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], *, log: bool) -> "_Frame":
        left, right = min(x for x, _ in points), max(x for x, _ in points)
        low, high = min(y for _, y in points), max(y for _, y in points)
        if right <= left:
            left, right = left - 0.5, right + 0.5
        if high <= low:
            room = abs(low) * 0.1 or 0.5
            low, high = low - room, high + room
        return cls(left, right, low, high, log)

    def place(self, point: tuple[float, float], columns: int, rows: int) -> tuple[int, int]:
        """Column and row in a grid of that size; row 0 is at the top."""
        across = (point[0] - self.left) / (self.right - self.left)
        up = (point[1] - self.low) / (self.high - self.low)
        return round(across * (columns - 1)), round((1 - up) * (rows - 1))

    def y_labels(self, rows: int) -> list[str]:
        """One for each row; most are empty."""
        labelled = {0, rows - 1, *(range(0, rows, 4) if rows > 6 else ())}
        if rows - 2 in labelled:
            labelled.discard(rows - 2)
        labels = []
        for row in range(rows):
            y = self.high - (self.high - self.low) * row / (rows - 1)
            labels.append(f"{10**y if self.log else y:.3g}" if row in labelled else "")
        return labels

    def x_labels(self, columns: int, name: str) -> str:
        left, right = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in self[:2])
        room = columns - len(left) - len(right)
        return left + (name if len(name) + 2 <= room else "").center(max(room, 1)) + right


Cells = list[list[tuple[str, int]]]
"""Rows of (character, number of the line that it belongs to; -1: none)."""


def _dots(lines: Sequence[_Line], frame: _Frame, columns: int, rows: int) -> Cells:
    """Lines in braille; a cell that several cross has the colour of the last."""
    bits = [[0] * columns for _ in range(rows)]
    owners = [[-1] * columns for _ in range(rows)]
    for number, line in enumerate(lines):
        for column, row in _strokes(line, frame, 2 * columns, 4 * rows):
            bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]
            owners[row // 4][column // 2] = number
    return [
        [(chr(BRAILLE + b) if b else " ", owner) for b, owner in zip(some, own, strict=True)]
        for some, own in zip(bits, owners, strict=True)
    ]


def _marks(lines: Sequence[_Line], frame: _Frame, columns: int, rows: int) -> Cells:
    """Lines as one mark each."""
    cells: Cells = [[(" ", -1)] * columns for _ in range(rows)]
    for number, line in enumerate(lines):
        for column, row in _strokes(line, frame, columns, rows):
            cells[row][column] = (MARKS[number % len(MARKS)], number)
    return cells


def _strokes(line: _Line, frame: _Frame, columns: int, rows: int) -> set[tuple[int, int]]:
    """Every place of a grid that a line passes."""
    passed: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for point in line.points:
        if point is None:
            before = None
            continue
        here = frame.place(point, columns, rows)
        from_column, from_row = before or here
        steps = max(abs(here[0] - from_column), abs(here[1] - from_row), 1)
        for step in range(steps + 1):
            share = step / steps
            passed.add(
                (
                    round(from_column + share * (here[0] - from_column)),
                    round(from_row + share * (here[1] - from_row)),
                )
            )
        before = here
    return passed


def _legend(names: Sequence[str], width: int, rows: int, *, colour: bool, ascii: bool) -> list[str]:
    """Which line is whose, in at most so many rows; the last says how many names did not fit."""
    lines: list[str] = []
    counts: list[int] = []
    used = width
    for number, name in enumerate(names if len(names) > 1 else []):
        mark = MARKS[number % len(MARKS)] if ascii or not colour else "━"
        item = f"{_painted(mark, number, colour)} {name[: width - 2]}"
        length = min(len(name), width - 2) + 2
        if used + length + 2 > width:
            lines.append(item)
            counts.append(1)
            used = length
        else:
            lines[-1] += "  " + item
            counts[-1] += 1
            used += length + 2
    if len(lines) <= rows:
        return lines
    left = len(names) - sum(counts[: rows - 1])
    return [*lines[: rows - 1], f"... and {left} more" if rows > 1 else f"{left} lines"]


def _painted(mark: str, number: int, colour: bool) -> str:
    if not colour or number < 0:
        return mark
    return f"\x1b[{COLOURS[number % len(COLOURS)]}m{mark}\x1b[0m"


def finite(value: float | None) -> float | None:
    """None where it is none to draw or to write as JSON."""
    return value if value is not None and math.isfinite(value) else None
