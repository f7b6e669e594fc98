"""The figure of `calm plot`: what runs have logged, one panel a quantity, one colour a run."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from calm.experiments.plot_style import INK, LINES, MUTED, style_axes
from calm.experiments.run_logs import AXES, RunLog

__all__ = ["panels_of", "plot_runs"]

ABREAST = 3
WIDTH, HEIGHT = 4.4, 3.2  # of a panel, inches
NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval
# What is logged beside the loss and its terms; of these the figure shows the last three.
BESIDE = (
    "step", "epoch", "learning_rate", "train_seconds", "characters_per_second",
    "peak_memory_bytes", "data_share", "forward_share", "backward_share", "optimizer_share",
    "skipped_steps", "grad_norm", "tokens_per_second", "mfu",
)  # fmt: skip
NOTES = {
    "loss": "line: training; dots: held-out text",
    "eval_brier_lm": "held-out text, with 95 % intervals where they were logged",
    "eval_accuracy": "share of held-out tokens that are reconstructed",
    "tokens_per_second": "of all processes, evaluation and saving included",
    "mfu": "share of the device's peak",
}
TITLES = {"eval_brier_lm": "BrierLM", "eval_accuracy": "accuracy", "mfu": "MFU"}
SCORES = ("eval_brier_lm", "eval_accuracy")
SHOWN_BESIDE = BESIDE[-3:]


def panels_of(runs: Sequence[RunLog]) -> list[str]:
    """What any of the runs has logged and the figure shows: loss, its terms, scores, speed."""
    names = list(dict.fromkeys(name for run in runs for name in run.names))
    terms = [
        name for name in names
        if not name.startswith(("eval_", "train_")) and name not in (*BESIDE, "loss", "total_flos")
    ]  # fmt: skip
    return [name for name in ("loss", *terms, *SCORES, *SHOWN_BESIDE) if name in names]


def plot_runs(runs: Sequence[RunLog], axis: str, path: Path) -> None:
    """Draw every panel over one of `AXES`, as the kind of image that the ending of `path` names.

    Raises:
        UserError: a run does not say what the axis needs.
    """
    panels = panels_of(runs)
    columns = min(ABREAST, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.05, hspace=0.05)
    size = (WIDTH * columns, HEIGHT * rows + 0.3)
    figure = Figure(size, dpi=140, facecolor="white", layout=layout)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip_longest(places, panels):
        if panel is None:
            axes.set_axis_off()
            continue
        style_axes(axes, TITLES.get(panel, panel.replace("_", " ")), NOTES.get(panel, ""))
        axes.set_xlabel(AXES[axis], color=MUTED, fontsize=8.5)
        for place, run in enumerate(runs):
            _draw(axes, run, panel, axis, LINES[place % len(LINES)])
    named, labels = places[0].get_legend_handles_labels()
    if len(runs) > 1:
        figure.legend(
            named, labels, loc="outside upper left", ncols=min(4, len(runs)), frameon=False,
            labelcolor=INK, fontsize=9,
        )  # fmt: skip
    figure.savefig(path)


def _draw(axes: Axes, run: RunLog, panel: str, axis: str, color: str) -> None:
    """A run's line; of an evaluation dots on it, with intervals."""
    x, y, errors = run.series(panel, axis)
    is_score = panel in SCORES
    if not is_score:
        axes.plot(x, y, color=color, linewidth=1.4, label=run.name)
    elif x:
        ends = [NORMAL_95 * error for error in errors] if errors else None
        axes.errorbar(
            x, y, yerr=ends, color=color, linewidth=1.4, elinewidth=1, marker="o", markersize=3,
            label=run.name,
        )  # fmt: skip
    if panel == "loss":
        held_out = run.series("eval_loss", axis)
        axes.plot(held_out.x, held_out.y, color=color, marker="o", markersize=3, linestyle="")
