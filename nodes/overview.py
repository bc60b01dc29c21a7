"""The whole mesh at one moment, as `mesh top` shows it: a row for each run of each node.

Rules: 1. It is made of two answers of one node, `status` and `peers`; what a node does not know is
None. 2. A trail holds as many values as a screen is wide, and goes with its row.
A figure's trip: answers -> look() -> Row -> Trails.follow() -> table() or as_json().
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import mesh
from nodes import chart, text

TRAIL_LIMIT: Final = 120
STATES: Final = ("alive", "suspect", "incompatible", "dead", "left")
"""In the order of how much a person has to do."""

SHORT_STATES: Final = {"incompatible": "incomp."}


class Row(NamedTuple):
    """One run on one node; `run` is None for a node that trains nothing."""

    id: str
    name: str
    own: bool
    state: str
    reason: str | None
    run: str | None
    step: int | None = None
    loss: float | None = None
    drift: float | None = None
    samples_s: float | None = None
    in_bytes_s: float | None = None
    out_bytes_s: float | None = None
    load: float | None = None
    """of its machine's processors"""
    cpu: float | None = None
    """cores that the node and its trainings use"""


class Look(NamedTuple):
    """One moment."""

    node: str
    mesh: str
    uptime_s: float
    health: list[str]
    rows: list[Row]


class Key(NamedTuple):
    """A column by which rows are sorted."""

    letter: str
    title: str
    falling: bool
    """the greatest first, until it is turned round"""


SORTS: Final = {
    "name": Key("n", "NAME", False),
    "state": Key("t", "STATE", False),
    "step": Key("s", "STEP", True),
    "loss": Key("l", "LOSS", True),
    "drift": Key("d", "DRIFT", True),
    "rate": Key("r", "SMP/S", True),
    "in": Key("i", "IN/S", True),
    "out": Key("o", "OUT/S", True),
    "cpu": Key("c", "CPU", True),
}


def look(status: dict[str, Any], peers: dict[str, Any]) -> Look:
    """Reads the two answers. Raises MeshError where they make no sense: another node's may not."""
    try:
        own = {"state": "alive", "reason": None, **peers["node"]}
        rows = _rows(own, own=True)
        for peer in peers["peers"]:
            rows += _rows(peer, own=False)
        uptime_s = float(status["node"]["uptime_s"])
        health = [str(warning) for warning in status["health"]]
        return Look(str(own["name"]), str(status["mesh"]["id"]), uptime_s, health, rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise mesh.MeshError(
            "the answer makes no sense here: is that node of this version?"
        ) from None


def _rows(node: dict[str, Any], *, own: bool) -> list[Row]:
    reason = None if node["reason"] is None else str(node["reason"])
    about = Row(str(node["id"]), str(node["name"]), own, str(node["state"]), reason, None)
    about = about._replace(load=_number(node["load"]), cpu=_number(node.get("cpu")))
    return [
        about._replace(
            run=str(run["run"]),
            step=None if run["step"] is None else int(run["step"]),
            loss=_number(run["loss"]),
            drift=_number(run["drift"]),
            samples_s=_number(run["samples_s"]),
            in_bytes_s=_number(run["in_bytes_s"]),
            out_bytes_s=_number(run["out_bytes_s"]),
        )
        for run in node["runs"]
    ] or [about]


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return None


def ordered(rows: Sequence[Row], sort: str, *, turned: bool = False) -> list[Row]:
    """By a column of SORTS; rows that know nothing of it come last, and names decide between equals."""
    falling = SORTS[sort].falling is not turned
    by_name = sorted(rows, key=lambda row: (row.name, row.id, row.run or ""))
    if sort == "name":
        return by_name[::-1] if falling else by_name
    known = [row for row in by_name if _value(row, sort) is not None]
    unknown = [row for row in by_name if _value(row, sort) is None]
    return sorted(known, key=lambda row: _value(row, sort) or 0.0, reverse=falling) + unknown


def _value(row: Row, sort: str) -> float | None:
    match sort:
        case "state":
            return float(STATES.index(row.state)) if row.state in STATES else len(STATES)
        case "step":
            return row.step
        case "loss":
            return row.loss
        case "drift":
            return row.drift
        case "rate":
            return row.samples_s
        case "in":
            return row.in_bytes_s
        case "out":
            return row.out_bytes_s
        case "cpu":
            return row.cpu
    raise ValueError(f"no column {sort}")


class Trails:
    """Loss and drift of each row while somebody looks."""

    def __init__(self) -> None:
        self._values: dict[
            tuple[str, str], deque[tuple[int | None, float | None, float | None]]
        ] = {}

    def follow(self, rows: Sequence[Row]) -> None:
        """Takes in a moment; a run that made no step leaves no value."""
        here = {(row.id, row.run): row for row in rows if row.run is not None}
        for key in [key for key in self._values if key not in here]:
            del self._values[key]
        for (node, run), row in here.items():
            trail = self._values.setdefault((node, run or ""), deque(maxlen=TRAIL_LIMIT))
            if not trail or trail[-1][0] != row.step:
                trail.append((row.step, row.loss, row.drift))

    def seed(self, histories: Sequence[dict[str, Any]]) -> None:
        """Puts what nodes remember (`mesh.history/1`) before what was seen here."""
        for history in histories:
            step, loss, drift = map(history["columns"].index, ("step", "loss", "drift"))
            for run in history["runs"]:
                trail = self._values.setdefault(
                    (history["node"]["id"], run["run"]), deque(maxlen=TRAIL_LIMIT)
                )
                seen = [*trail]
                first = seen[0][0] if seen else None
                trail.clear()
                for point in run["points"]:
                    if first is None or point[step] < first:
                        trail.append((point[step], point[loss], point[drift]))
                trail.extend(seen)

    def losses(self, row: Row) -> list[float | None]:
        return [loss for _, loss, _ in self._values.get((row.id, row.run or ""), ())]

    def drifts(self, row: Row) -> list[float | None]:
        return [drift for _, _, drift in self._values.get((row.id, row.run or ""), ())]


# --------------------------------------------------------------------------------------- as text


class Layout(NamedTuple):
    """Widths of the columns that may be wider or narrower."""

    name: int
    run: int
    """0: not shown"""
    spark: int

    @classmethod
    def of(cls, rows: Sequence[Row], width: int) -> "Layout":
        """What fits `width`: trails of 5, then the names, the runs where there are several, longer
        trails."""
        room = width - FIXED_WIDTH
        longest = max([text.width(row.name) for row in rows] + [4])
        name = min(longest, max(room - 10, NAME_LEAST))
        room -= name
        runs = {row.run for row in rows if row.run is not None}
        run = min(max(map(text.width, runs), default=0), 12, room - 11) if len(runs) > 1 else 0
        run = run if run >= 3 else 0
        room -= run + (run > 0)
        return cls(name, run, max(0, min(room // 2, 24)))


WIDTHS: Final = {
    "STATE": 7,
    "STEP": 7,
    "LOSS": 6,
    "DRIFT": 6,
    "SMP/S": 5,
    "IN/S": 5,
    "OUT/S": 5,
    "CPU": 5,
}
NAME_LEAST: Final = 8
"""Below that names are not told apart; a narrower terminal loses its last columns instead."""

FIXED_WIDTH: Final = 2 + sum(WIDTHS.values()) + len(WIDTHS) + 2
"""The mark of the own node, the columns of figures, and a space between any two of all columns."""


def head(layout: Layout) -> list[str]:
    """Titles, each as wide as its column."""
    titles = ["  " + "NAME".ljust(layout.name), *(["RUN".ljust(layout.run)] if layout.run else [])]
    for title, width in WIDTHS.items():
        titles.append(title.ljust(width) if title == "STATE" else title.rjust(width))
        if title in ("LOSS", "DRIFT"):
            titles.append(" " * layout.spark)
    return titles


def cells(row: Row, trails: Trails, layout: Layout, *, ascii: bool = False) -> list[str]:
    """One row, each cell as wide as its column; of a node that is gone the reason, at the end."""
    first = ("* " if row.own else "  ") + text.fitted(row.name, layout.name)
    drawn = [first, *([text.fitted(row.run or "-", layout.run)] if layout.run else [])]
    drawn.append(SHORT_STATES.get(row.state, row.state).ljust(WIDTHS["STATE"]))
    if row.state != "alive" and row.reason:
        return [*drawn, row.reason]
    percent = None if row.cpu is None else min(100 * row.cpu, 9999)
    sparks = [
        chart.sparkline(values, layout.spark, ascii=ascii) if layout.spark else ""
        for values in (trails.losses(row), trails.drifts(row))
    ]
    return [
        *drawn,
        _step(row.step).rjust(WIDTHS["STEP"]),
        _figure(row.loss).rjust(WIDTHS["LOSS"]),
        sparks[0],
        _figure(row.drift).rjust(WIDTHS["DRIFT"]),
        sparks[1],
        short(row.samples_s).rjust(WIDTHS["SMP/S"]),
        short(row.in_bytes_s).rjust(WIDTHS["IN/S"]),
        short(row.out_bytes_s).rjust(WIDTHS["OUT/S"]),
        ("-" if percent is None else f"{percent:.0f}%").rjust(WIDTHS["CPU"]),
    ]


def _figure(value: float | None) -> str:
    """In at most six characters, with as many digits as they hold, three at most."""
    if value is None or abs(value) >= 999.5:
        return short(value)
    return next((t for d in (3, 2) if len(t := f"{value:.{d}g}") <= 6), f"{value:.0e}")


def _step(value: int | None) -> str:
    return short(value) if value is None or value >= 1_000_000 else f"{value:,}"


def short(value: float | None) -> str:
    """A number in at most five characters: 0, 950, 18.4k, 1.2M."""
    if value is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            digits = 0 if not unit or abs(value) >= 99.5 else 1
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def summary(seen: Look) -> list[str]:
    """The two lines above the table: what the mesh does, and what is wrong."""
    nodes = {row.id: row.state for row in seen.rows}
    states = list(nodes.values())
    counted = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    total = {
        name: sum(value for row in seen.rows if (value := _value(row, name)) is not None)
        for name in ("rate", "in", "out")
    }
    first = (
        f"mesh {seen.mesh}  {len(nodes)} nodes: {counted}  {short(total['rate'])} samples/s  "
        f"in {short(total['in'])}B/s  out {short(total['out'])}B/s"
    )
    more = f" (and {len(seen.health) - 1} more: mesh status)" if len(seen.health) > 1 else ""
    return [first, f"health {seen.health[0]}{more}" if seen.health else "health ok"]


def as_json(seen: Look, rows: Sequence[Row]) -> dict[str, Any]:
    """`mesh.top/1`."""
    return {
        "schema": "mesh.top/1",
        "node": seen.node,
        "mesh": seen.mesh,
        "uptime_s": seen.uptime_s,
        "health": seen.health,
        "rows": [row._asdict() for row in rows],
    }
