"""What a node remembers, as versioned JSON: `mesh.events/1`, `mesh.logs/1`, `mesh.history/1`.

Rules as in report.py. The wall clock comes in here: `time` is Unix seconds, computed from the node's
uptime at the moment of the answer, so what happened before the clock was set shows the right time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mesh.core.messages import Member
from mesh.history import Curve, Point
from mesh.journal import Happening

COLUMNS: Final = list(Point._fields)


def events(
    kept: Sequence[Happening], own: Member, *, since: int, uptime_s: float, wall_s: float
) -> dict[str, Any]:
    """`mesh.events/1`: ask again with `since` = `next` for what came after."""
    entries = [
        {
            **_moment(event, wall_s - uptime_s),
            "kind": event.kind,
            "text": event.text,
            "node": event.node,
            "run": event.run,
        }
        for event in kept
    ]
    return {"schema": "mesh.events/1", **_page(kept, own, since), "events": entries}


def logs(
    kept: Sequence[Happening], own: Member, *, since: int, uptime_s: float, wall_s: float
) -> dict[str, Any]:
    """`mesh.logs/1`: the lines that the node printed; otherwise as events()."""
    lines = [{**_moment(line, wall_s - uptime_s), "text": line.text} for line in kept]
    return {"schema": "mesh.logs/1", **_page(kept, own, since), "lines": lines}


def _page(kept: Sequence[Happening], own: Member, since: int) -> dict[str, Any]:
    return {
        "node": {"id": own.node, "name": own.name},
        "next": kept[-1].sequence if kept else since,
    }


def _moment(happening: Happening, began_s: float) -> dict[str, Any]:
    return {
        "seq": happening.sequence,
        "time": round(began_s + happening.at_s, 3),
        "uptime_s": round(happening.at_s, 3),
    }


def history(
    curves: Mapping[str, Curve],
    own: Member,
    *,
    run: str | None,
    points: int,
    uptime_s: float,
    wall_s: float,
) -> dict[str, Any]:
    """`mesh.history/1`: of each run at most `points` rows, each with the columns that are named."""
    return {
        "schema": "mesh.history/1",
        "node": {"id": own.node, "name": own.name},
        "time": round(wall_s, 3),
        "uptime_s": round(uptime_s, 3),
        "columns": COLUMNS,
        "runs": [
            {
                "run": name,
                "interval_s": curve.interval_s,
                "points": [_row(point) for point in curve.points(points)],
            }
            for name, curve in curves.items()
            if run is None or run == name
        ],
    }


def _row(point: Point) -> list[float | None]:
    return [
        round(point.uptime_s, 2),
        point.step,
        _figure(point.loss),
        _figure(point.drift),
        point.samples,
        point.bytes_sent,
        point.bytes_received,
    ]


def _figure(value: float | None) -> float | None:
    """Six digits: a plot has no place for more, and an answer is to be short."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
