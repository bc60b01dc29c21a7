"""Curves of a simulated training: a picture where matplotlib is, and lines of text everywhere.

Rule: matplotlib is loaded when something is drawn, never before.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import mesh

Points = Sequence[tuple[float, float]]

WIDTH: Final = 64
HEIGHT: Final = 12
MARKS: Final = "*o+x#@%&"
PIECES: Final = 128
"""Points of a curve that is the mean of many."""


def possible() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def losses(reports: dict[str, mesh.LearningReport]) -> dict[str, Points]:
    """By strategy: (step, mean loss of all machines), smoothed into PIECES pieces."""
    curves: dict[str, Points] = {}
    for name, report in reports.items():
        honest = [h.losses for h in report.histories if h.losses and not h.attacker]
        last = max((curve[-1][0] for curve in honest), default=0)
        sums = [[0.0, 0.0, 0] for _ in range(PIECES)]
        for curve in honest:
            for step, loss in curve:
                piece = sums[min(PIECES - 1, (step - 1) * PIECES // max(1, last))]
                piece[0], piece[1], piece[2] = piece[0] + step, piece[1] + loss, piece[2] + 1
        curves[name] = [(step / n, loss / n) for step, loss, n in sums if n]
    return curves


def chart(curves: dict[str, Points], title: str) -> str:
    """A drawing in text, one mark for each curve."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return f"{title}: nothing to draw (node.step(loss=...) says it)"
    right = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for (_, curve), mark in zip(curves.items(), MARKS, strict=False):
        for x, y in curve:
            column = min(WIDTH - 1, int(x / right * WIDTH)) if right else 0
            row = round((high - y) / (high - low) * (HEIGHT - 1)) if high > low else 0
            rows[row][column] = mark
    labels = [f"{high:9.3g}", *[" " * 9] * (HEIGHT - 2), f"{low:9.3g}"]
    drawn = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    legend = "   ".join(f"{mark} {name}" for name, mark in zip(curves, MARKS, strict=False))
    axis = f"{'':9} +{'-' * WIDTH}\n{'':11}0{right:>{WIDTH - 1}.0f}"
    return "\n".join([title, *drawn, axis, f"{'':11}{legend}"])


def picture(reports: dict[str, mesh.LearningReport], out: Path) -> None:
    """Loss, accuracy where it was evaluated, and drift, by step. Raises OSError, UsageError."""
    from matplotlib.figure import Figure

    accurate = any(look.accuracy for report in reports.values() for look in report.looks)
    names = ["loss", *(["accuracy"] if accurate else []), "drift"]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    axes = dict(zip(names, figure.subplots(1, len(names)), strict=True))
    curves = losses(reports)
    for rank, (name, report) in enumerate(reports.items()):
        colour = f"C{rank}"
        axes["loss"].plot(*_columns(curves[name]), color=colour, label=name)
        drift = [(look.step, look.drift) for look in report.looks]
        axes["drift"].plot(*_columns(drift), color=colour, label=name)
        looks = [(look.step, look.accuracy) for look in report.looks if look.accuracy]
        if accurate and looks:
            axis = axes["accuracy"]
            averaged = [(step, found.averaged) for step, found in looks]
            mean = [(step, found.mean) for step, found in looks]
            worst = [(step, found.worst) for step, found in looks]
            axis.plot(*_columns(averaged), color=colour, label=f"{name}: averaged")
            axis.plot(*_columns(mean), color=colour, linestyle="--", label="mean node")
            axis.plot(*_columns(worst), color=colour, linestyle=":", label="worst node")
    for name, axis in axes.items():
        axis.set_title(name)
        axis.set_xlabel("step")
        if axis.has_data():
            axis.legend(fontsize="small")
    axes["loss"].set_yscale("log")
    try:
        figure.savefig(out)
    except ValueError as error:  # an ending that matplotlib does not know
        raise mesh.UsageError(f"-o {out}: {error}") from None


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
