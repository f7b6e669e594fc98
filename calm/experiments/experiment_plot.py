"""The figure of an experiment: its panels side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from calm.experiments.experiment import Panel, Result
from calm.experiments.plot_style import INK, LINES, MUTED, style_axes

__all__ = ["plot_experiment"]

MANY = 24  # points of a line beyond which they get no marks
WIDTH, HEIGHT = 5.6, 4.4  # of a panel, inches


def plot_experiment(panels: Sequence[Panel], results: Sequence[Result], path: Path) -> None:
    """Every panel; points of several seeds stand one above the other, lines pass their mean."""
    count = len(panels)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
    figure = Figure((WIDTH * count, HEIGHT), dpi=140, facecolor="white", layout=layout)
    for axes, panel in zip(figure.subplots(1, count, squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, [result for result in results if result.matches(panel.where)])
    figure.savefig(path)


def _draw(axes: Axes, panel: Panel, results: Sequence[Result]) -> None:
    style_axes(axes, panel.title, panel.note)
    lines: dict[Any, list[Result]] = {}
    for result in results:
        lines.setdefault(result.labels.get(panel.line or "", ""), []).append(result)
    for index, (name, members) in enumerate(lines.items()):
        points = [point for result in members for point in _points(panel, result)]
        _line(axes, points, LINES[index % len(LINES)], str(name), best=panel.is_frontier)
    if panel.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(panel.x.replace("_", " "), color=MUTED, fontsize=8.5)
    if panel.line:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, title=panel.line, title_fontsize=8)


def _line(
    axes: Axes, points: Sequence[tuple[Any, float]], color: str, label: str, *, best: bool
) -> None:
    """Points, and a line through their means at each place, or through the best of them."""
    by_x: dict[Any, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    is_numeric = all(isinstance(x, int | float) for x in by_x)
    places = sorted(by_x) if is_numeric else [*by_x]
    means = [max(by_x[x]) if best else sum(by_x[x]) / len(by_x[x]) for x in places]
    shown = places if is_numeric else [str(x) for x in places]
    axes.plot(shown, means, color=color, linewidth=1.6, label=label)
    if len(places) > MANY:
        return
    for x, place in zip(places, shown, strict=True):
        axes.plot([place] * len(by_x[x]), by_x[x], color=color, marker="o", ls="", markersize=4)


def _points(panel: Panel, result: Result) -> list[tuple[Any, float]]:
    """Where the panel shows a result: at one place, or along its curve."""
    if panel.is_curve:
        return [(entry[panel.x], entry[panel.y]) for entry in result.curve]
    x, y = _read(result, panel.x), result.values.get(panel.y)
    return [] if x is None or y is None else [(x, float(y))]


def _read(result: Result, name: str) -> Any:
    """A label, or a value."""
    return result.labels.get(name, result.values.get(name))
