"""The figure of an experiment: its panels side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from calm.experiments.experiment import Panel, Result
from calm.experiments.naming import factor, number, title
from calm.experiments.plot_style import INK, LINES, MUTED, style_axes
from calm.experiments.verdicts import METRICS, by_cell, mean_and_interval, seed_spread

__all__ = ["plot_experiment"]

ABREAST = 3  # panels of one row; more take two
WIDTH, HEIGHT = 5.6, 4.4  # of a panel, inches
TIMES = 5.0  # a logarithmic axis needs values that are this many times apart
LETTERS = 60  # of all names along an axis, beyond which they are slanted


@dataclass(frozen=True)
class _Point:
    """Where a panel shows a cell: the mean of its seeds, their values, and half its interval."""

    x: Any
    y: float
    seeds: Sequence[float] = ()
    interval: float | None = None


def plot_experiment(panels: Sequence[Panel], results: Sequence[Result], path: Path) -> None:
    """Every panel. Bars are 95 % intervals, dots the seeds of a cell where it has several."""
    rows = 1 if len(panels) <= ABREAST else 2
    columns = math.ceil(len(panels) / rows)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
    figure = Figure((WIDTH * columns, HEIGHT * rows), dpi=140, facecolor="white", layout=layout)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip_longest(places, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw(axes, panel, results)
    figure.savefig(path)


def _draw(axes: Axes, panel: Panel, results: Sequence[Result]) -> None:
    style_axes(axes, panel.title, panel.note)
    lines: dict[str, list[list[Result]]] = {}
    for cell in by_cell(result for result in results if panel.shows(result)):
        lines.setdefault(str(cell[0].labels.get(panel.line or "", "")), []).append(cell)
    shown = [
        point
        for index, (name, cells) in enumerate(lines.items())
        for point in _line(axes, panel, cells, results, LINES[index % len(LINES)], name)
    ]
    _label_x(axes, panel, [point.x for point in shown])
    axes.set_xlabel(title(panel.x), color=MUTED, fontsize=8.5)
    axes.set_ylabel(title(panel.y), color=MUTED, fontsize=8.5)
    if panel.line and lines:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, title=panel.line, title_fontsize=8)


def _line(
    axes: Axes, panel: Panel, cells: Sequence[list[Result]], results: Sequence[Result],
    color: str, name: str,
) -> list[_Point]:  # fmt: skip
    """Its points; on a numeric axis in their order, with a line."""
    if panel.is_curve:
        points = [point for cell in cells for point in _curve(panel, cell)]
    else:
        points = [point for cell in cells if (point := _point(panel, cell, results))]
    if _is_numeric(points):
        points = sorted(points, key=lambda point: point.x)
    through = _best_at_each_place(points) if panel.is_frontier else points
    place = float if _is_numeric(points) else str
    axes.plot([place(point.x) for point in through], [point.y for point in through], color=color,
              linewidth=1.6, ls="-" if _is_numeric(points) else "", label=name)  # fmt: skip
    for point in points:
        if point.seeds:
            axes.errorbar([place(point.x)], [point.y], yerr=point.interval, color=color,
                          marker="o", markersize=4, linewidth=1.2, capsize=2)  # fmt: skip
        if len(point.seeds) > 1:
            axes.plot([place(point.x)] * len(point.seeds), point.seeds, color=color, marker=".",
                      ls="", markersize=4, alpha=0.5)  # fmt: skip
    return points


def _is_numeric(points: Sequence[_Point]) -> bool:
    return all(isinstance(point.x, int | float) for point in points)


def _point(panel: Panel, cell: Sequence[Result], results: Sequence[Result]) -> _Point | None:
    first, unit = cell[0], factor(panel.y)
    x = first.labels.get(panel.x, first.values.get(panel.x))
    seeds = [unit * float(each.values[panel.y]) for each in cell
             if each.values.get(panel.y) is not None]  # fmt: skip
    if x is None or not seeds:
        return None
    text, _, metric = panel.y.rpartition("/")
    interval = None
    if metric in METRICS:
        _, half = mean_and_interval(cell, metric, text, seed_spread(results, metric, text))
        interval = unit * half
    return _Point(x, sum(seeds) / len(seeds), seeds, interval)


def _curve(panel: Panel, cell: Sequence[Result]) -> list[_Point]:
    """The mean over seeds at each place of a cell's curve."""
    places: dict[float, list[float]] = {}
    for result in cell:
        for entry in result.curve:
            places.setdefault(entry[panel.x], []).append(factor(panel.y) * entry[panel.y])
    return [_Point(x, sum(values) / len(values)) for x, values in places.items()]


def _best_at_each_place(points: Sequence[_Point]) -> list[_Point]:
    best: Mapping[Any, _Point] = {point.x: point for point in sorted(points, key=lambda p: p.y)}
    return sorted(best.values(), key=lambda point: point.x)


def _label_x(axes: Axes, panel: Panel, places: Sequence[Any]) -> None:
    """Long names slanted; a logarithmic axis with few, short labels, linear around 0."""
    if not all(isinstance(place, int | float) for place in places):
        axes.margins(x=0.15)
        if sum(len(str(place)) for place in set(places)) > LETTERS:
            axes.tick_params(axis="x", labelrotation=20)
        return
    positive = [place for place in places if place > 0]
    if not panel.log_x or not positive or max(positive) < TIMES * min(positive):
        return
    if min(places) <= 0:
        axes.set_xscale("symlog", linthresh=min(positive))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.xaxis.set_minor_locator(NullLocator())
