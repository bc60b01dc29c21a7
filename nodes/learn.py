"""`mesh sim SCRIPT`: a script's training on many virtual machines, by one strategy or several.

A strategy's trip: run() -> mesh.simulate_script() -> its report -> a line of the table, a curve of each
drawing. Rule: what the script prints goes to standard error, each line behind its machine's rank.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mesh
from nodes import chart, drawing, output, text, watch

AS_IT_IS: Final = "as it is"
ONE_PLACE: Final = "one-place"
PLAIN_WIDTH: Final = 80
CHART_LINES: Final = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What to simulate."""

    script: str
    arguments: tuple[str, ...]
    nodes: int
    seed: int
    strategies: tuple[str, ...]
    """empty: the script's own, and one place beside it"""
    evaluate: str | None
    out: str | None
    """where to draw; None: beside nothing, in the current directory under the script's name"""
    as_json: bool


def run(lesson: Lesson) -> int:
    """Simulates, prints and draws; returns the exit code. Raises MeshError."""
    out = None if lesson.out is None else output.picture("-o", lesson.out)
    reports: dict[str, mesh.LearningReport] = {}
    for name in _strategies(lesson):
        print(f"{lesson.nodes} machines, {name}", file=sys.stderr)
        try:
            reports[name] = mesh.simulate_script(
                lesson.script,
                lesson.arguments,
                nodes=lesson.nodes,
                seed=lesson.seed,
                strategy=None if name == AS_IT_IS else name,
                evaluate=lesson.evaluate,
                said=_say,
            )
        except mesh.ScriptFailed as error:
            if lesson.as_json:
                about = {"schema": "mesh.error/1", "code": "script", "message": str(error)}
                print(json.dumps({**about, "hint": error.hint}))
            print(error, file=sys.stderr)
            return error.exit_code
    if lesson.as_json:
        print(json.dumps(_as_json(lesson, reports)))
    else:
        print(_charts(reports))
        print("\n" + _table(reports))
    if out is not None or drawing.possible():
        _draw(reports, out, Path(f"{Path(lesson.script).stem}-sim.png"))
    return 0


def _draw(reports: dict[str, mesh.LearningReport], asked: Path | None, default: Path) -> None:
    """Raises MeshError where a picture was asked for; one that nobody asked for may be missing."""
    out = asked or default
    try:
        drawing.picture(reports, out)
        print(f"drawn: {out}", file=sys.stderr)
    except OSError as error:
        said = f"cannot draw {out}: {error.strerror}"
        if asked is not None:
            raise mesh.MeshError(said) from None
        print(f"mesh: {said}; -o names another file", file=sys.stderr)


def _strategies(lesson: Lesson) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(lesson.strategies)) or (AS_IT_IS,)
    return named if ONE_PLACE in named or lesson.nodes == 1 else (*named, ONE_PLACE)


def _say(rank: int, line: str) -> None:
    print(f"{rank:3} | {line}", file=sys.stderr)


def _charts(reports: dict[str, mesh.LearningReport]) -> str:
    """Loss, accuracy of the averaged model where it was evaluated, and drift, in characters."""
    drawn = watch.on_terminal()
    width = os.get_terminal_size(sys.stdout.fileno()).columns - 1 if drawn else PLAIN_WIDTH
    curves = {"loss, mean of all machines": drawing.losses(reports)}
    if any(look.accuracy for report in reports.values() for look in report.looks):
        curves["accuracy of the averaged model"] = {
            name: [(look.step, look.accuracy.averaged) for look in report.looks if look.accuracy]
            for name, report in reports.items()
        }
    curves["drift"] = {
        name: [(look.step, look.drift) for look in report.looks] for name, report in reports.items()
    }
    return "\n".join(
        chart.chart(
            [chart.Series(name, points) for name, points in lines.items()],
            width=width,
            height=CHART_LINES,
            title=title,
            x_label="step",
            colour=drawn and not os.environ.get("NO_COLOR"),
            ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"),
        )
        for title, lines in curves.items()
    )


def _table(reports: dict[str, mesh.LearningReport]) -> str:
    heads = ["", "loss", "averaged", "mean node", "worst node", "drift", "models sent"]
    rows = [heads]
    for name, report in reports.items():
        found = report.accuracy
        said = (
            [f"{x:.4g}" for x in (found.averaged, found.mean, found.worst)] if found else ["-"] * 3
        )
        rows.append(
            [name, f"{report.loss:.4g}", *said, f"{report.drift:.3g}", f"{report.transfers:.1f}"]
        )
    return text.table(rows)


def _as_json(lesson: Lesson, reports: dict[str, mesh.LearningReport]) -> dict[str, Any]:
    """`mesh.learning/1`."""
    return {
        "schema": "mesh.learning/1",
        "script": lesson.script,
        "nodes": lesson.nodes,
        "seed": lesson.seed,
        "strategies": {name: _figures(report) for name, report in reports.items()},
    }


def _figures(report: mesh.LearningReport) -> dict[str, Any]:
    found = report.accuracy
    return {
        "loss": chart.finite(report.loss),
        "averaged": chart.finite(found.averaged) if found else None,
        "mean_node": chart.finite(found.mean) if found else None,
        "worst_node": chart.finite(found.worst) if found else None,
        "drift": chart.finite(report.drift),
        "transfers": round(report.transfers, 3),
        "bytes_sent": round(report.bytes_sent),
        "steps": [history.steps for history in report.histories],
        "virtual_s": round(report.virtual_s, 3),
        "wall_s": round(report.wall_s, 3),
        "digest": report.digest,
    }
