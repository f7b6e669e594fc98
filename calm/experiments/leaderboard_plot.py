"""The figure of `calm compare`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calm.experiments.leaderboard import Leaderboard
from calm.experiments.plot_style import GRID, INK, MUTED, ORANGE, TEAL, style_axes

__all__ = ["plot_leaderboard"]


def plot_leaderboard(board: Leaderboard, path: Path) -> None:
    """Scores with intervals, and differences from the first with theirs, as one image."""
    height = 1.6 + 0.45 * len(board.rows)
    figure = Figure(figsize=(11.5, height), dpi=140, facecolor="white", layout="constrained")
    scores, differences = figure.subplots(1, 2, sharey=True)
    metric = board.decided_by
    label, factor = ("BrierLM", 1.0) if metric == "brier_lm" else ("Brier-1 (%)", 100.0)
    for row in board.rows:
        color = ORANGE if row.kind == "baseline" else TEAL
        _bar(scores, row.rank, row.values[metric], row.intervals[metric], factor, color)
        if row.to_first is None:
            differences.plot([0], [row.rank], "o", color=color, markersize=5)
        else:
            value, ends = row.to_first.difference[metric], row.to_first.interval[metric]
            _bar(differences, row.rank, value, ends, factor, MUTED if row.is_tied else color)
    style_axes(scores, label, "95 % intervals; higher is better")
    style_axes(differences, "Difference from the first", "same positions; grey: tied")
    differences.axvline(0, color=INK, linewidth=0.8)
    for axes in (scores, differences):
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    scores.set_yticks([row.rank for row in board.rows], [row.name for row in board.rows])
    scores.set_ylim(len(board.rows) + 0.6, 0.4)
    figure.savefig(path)


def _bar(
    axes: Axes, place: int, value: float, ends: tuple[float, float], factor: float, color: str
) -> None:
    axes.plot([factor * end for end in ends], [place, place], color=color, linewidth=2)
    axes.plot([factor * value], [place], "o", color=color, markersize=5)
