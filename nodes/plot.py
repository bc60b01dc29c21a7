"""`mesh plot`: loss and drift of every node over time, as a chart in the terminal or as a picture.

Rules: 1. Every node is asked for the history that it keeps itself; one that does not answer is named
and left out. 2. Clocks of other machines are not trusted: a point lies so long before its node's
answer as that node says. 3. matplotlib is needed for a picture only, and loaded for it only.
A point's way: a node's history -> _curves() -> Series in minutes -> chart.chart() or a figure's axes.
"""

import contextlib
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import mesh
from nodes import chart, output, watch
from nodes.chart import Series

ASKED_AT_ONCE: Final = 8
POINTS: Final = 240
"""Of each run: more than a chart has columns, and 100 nodes' answers stay below 2 MB."""

PLAIN_WIDTH, PLAIN_HEIGHT = 80, 36
LOGARITHMIC: Final = 30.0
"""From which ratio of the greatest to the least value on an axis is logarithmic."""

LEGEND_LIMIT: Final = 24
UNITS: Final = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days"))
UNIT_LEAST: Final = 3.0
"""An axis is labelled in the largest unit of which it shows so many."""


class Order(NamedTuple):
    """What to draw, and where."""

    state: str | None
    node: str | None
    run: str | None
    output: str | None
    as_json: bool


class Picture(NamedTuple):
    """Both charts, in one unit of time."""

    unit: str
    loss: list[Series]
    drift: list[Series]


def run(order: Order) -> int:
    """Draws; returns the exit code. Raises MeshError."""
    path = None if order.output is None else output.picture("-o", order.output)
    found = histories(
        order.state,
        order.node,
        run=order.run,
        missed=lambda text: print(f"mesh: {text}", file=sys.stderr),
    )
    if order.as_json:
        print(json.dumps({"schema": "mesh.plot/1", "nodes": found}))
        return 0
    picture = _curves(found)
    if not picture.loss:
        wanted = "nothing" if order.run is None else f"no run {order.run!r}"
        raise mesh.MeshError(f"{wanted} was trained here yet: `mesh run SCRIPT` trains")
    if path is None:
        print(_characters(picture))
    else:
        _file(picture, path)
    return 0


def histories(
    state: str | None,
    node: str | None,
    *,
    run: str | None = None,
    points: int = POINTS,
    most: int | None = None,
    missed: Callable[[str], None],
) -> list[dict[str, Any]]:
    """`mesh.history/1` of the node that is meant and of those that it knows alive and that have any, the
    `most` of them that train first; `missed` hears who did not answer. Raises MeshError."""
    fields: dict[str, Any] = {"points": points, **({} if run is None else {"run": run})}
    own = mesh.question("history", state=state, name=node, **fields)
    peers = mesh.question("peers", state=state, name=node)["peers"]
    # One that trains nothing now may have; but who asks few asks those that do.
    others = sorted(
        (peer for peer in peers if peer["state"] == "alive"), key=lambda peer: not peer["runs"]
    )

    def ask(peer: dict[str, Any]) -> dict[str, Any] | None:
        try:
            answer = mesh.question("history", state=state, name=peer["id"], **fields)
            if not _makes_sense(answer):
                raise mesh.MeshError("its answer makes no sense here: is it of this version?")
        except mesh.MeshError as error:
            missed(f"{peer['name']} is left out: " + str(error).partition("\n")[0])
            return None
        return answer

    found = _at_once(ask, others[:most])
    answers = [own, *(a for a in found if a and any(past["points"] for past in a["runs"]))]
    for answer in answers:
        answer.pop("ok", None)
    return answers


def _makes_sense(answer: dict[str, Any]) -> bool:
    """Whether another node's history has the shape of `mesh.history/1`, as far as it is read here."""
    match answer:
        case {
            "node": {"id": str(), "name": str()},
            "uptime_s": int() | float() as uptime_s,
            "columns": list(columns),
            "runs": list(runs),
        } if math.isfinite(uptime_s) and {"uptime_s", "step", "loss", "drift"} <= set(
            map(str, columns)
        ):
            return all(_is_curve(run, columns) for run in runs)
    return False


def _is_curve(run: object, columns: list[str]) -> bool:
    match run:
        case {"run": str(), "points": list(points)}:
            at, step = columns.index("uptime_s"), columns.index("step")
            return all(
                isinstance(point, list)
                and len(point) == len(columns)
                and all(value is None or type(value) in (int, float) for value in point)
                and None not in (point[at], point[step])
                and math.isfinite(point[at])
                for point in points
            )
    return False


def _at_once(
    ask: Callable[[dict[str, Any]], dict[str, Any] | None], peers: Sequence[dict[str, Any]]
) -> list[dict[str, Any] | None]:
    """Asks several at a time. Not an executor: Python waits for its threads when it ends, and one of
    these may wait for a node that hangs."""
    found: list[dict[str, Any] | None] = [None] * len(peers)
    left = deque(enumerate(peers))

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                number, peer = left.popleft()
                found[number] = ask(peer)

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(ASKED_AT_ONCE, len(peers)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _curves(found: Sequence[dict[str, Any]]) -> Picture:
    """Lines over the time since the first point, named by node, and by run where there are several."""
    runs = {run["run"] for history in found for run in history["runs"]}
    loss: list[Series] = []
    drift: list[Series] = []
    for history in found:
        at, step_loss, step_drift = map(history["columns"].index, ("uptime_s", "loss", "drift"))
        for run in history["runs"]:
            if not run["points"]:
                continue
            name = history["node"]["name"] + (f" {run['run']}" if len(runs) > 1 else "")
            before = [(point[at] - history["uptime_s"], point) for point in run["points"]]
            loss.append(Series(name, [(ago, point[step_loss]) for ago, point in before]))
            drift.append(Series(name, [(ago, point[step_drift]) for ago, point in before]))
    first = min((series.points[0][0] for series in loss), default=0.0)
    last = max((series.points[-1][0] for series in loss), default=0.0)
    seconds, unit = max((u for u in UNITS if (last - first) / u[0] >= UNIT_LEAST), default=UNITS[0])
    return Picture(
        unit,
        [_from(series, first, seconds) for series in loss],
        [_from(series, first, seconds) for series in drift],
    )


def _from(series: Series, first: float, unit_s: float) -> Series:
    return Series(series.name, [((ago - first) / unit_s, value) for ago, value in series.points])


def _logarithmic(series: Sequence[Series]) -> bool:
    known = [y for one in series for _, y in one.points if y is not None and math.isfinite(y)]
    return bool(known) and min(known) > 0 and max(known) / min(known) >= LOGARITHMIC


# -------------------------------------------------------------------------------------- terminal


def _characters(picture: Picture) -> str:
    drawn = watch.on_terminal()
    columns, lines = PLAIN_WIDTH, PLAIN_HEIGHT
    if drawn:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
    ascii = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    return "\n".join(
        chart.chart(
            series,
            width=columns - 1,
            height=max((lines - 2) // 2, 8),
            title=title,
            x_label=picture.unit,
            log=_logarithmic(series),
            colour=drawn and not os.environ.get("NO_COLOR"),
            ascii=ascii,
        )
        for title, series in (("loss", picture.loss), ("drift", picture.drift))
    )


# ----------------------------------------------------------------------------------- matplotlib


def _file(picture: Picture, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, title, lines in ((upper, "loss", picture.loss), (lower, "drift", picture.drift)):
        for series in lines:
            values = [math.nan if y is None else y for _, y in series.points]
            # A $ in a name would be read as a formula, an underscore at its start hides it.
            label = " " + series.name.replace("$", r"\$")
            axes.plot([x for x, _ in series.points], values, label=label, linewidth=1.2)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if _logarithmic(lines):
            axes.set_yscale("log")
    lower.set_xlabel(picture.unit)
    if len(picture.loss) <= LEGEND_LIMIT:
        upper.legend(fontsize="small")
    else:
        upper.set_title(f"{len(picture.loss)} lines: too many to name")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise mesh.UsageError(f"-o {path}: {error.strerror}") from None
