"""Curves of a simulated training, and a picture of them where matplotlib is.

Rule: matplotlib is loaded when something is drawn, never before.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import mesh

Points = Sequence[tuple[float, float]]

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


def picture(reports: dict[str, mesh.LearningReport], out: Path) -> None:
    """Loss, accuracy where it was evaluated, and drift, by step. Raises OSError."""
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
    figure.savefig(out)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
