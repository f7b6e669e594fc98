"""The figure of the demo."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from calm.experiments.demo_report import (
    ORDERS,
    DemoResults,
    LanguageModelResults,
    temperature_name,
)
from calm.experiments.demo_stages import StageRun
from calm.experiments.plot_style import INK, MUTED, ORANGE, TEAL, VIOLET, style_axes

__all__ = ["plot_demo"]

# Opacity of Brier-1 to Brier-4; a color stands for a model.
SHADES = (1.0, 0.78, 0.58, 0.4)
SMALLEST = 0.03  # percent; a smaller Brier-n is not drawn
SAMPLE_WIDTH, SAMPLE_LINES = 74, 4


def plot_demo(results: DemoResults, path: Path) -> None:
    """Brier-1 to Brier-4 over training time, losses, reconstruction and a sample, as one PNG."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.06, hspace=0.08)
    figure = Figure(figsize=(12.5, 8.2), dpi=140, facecolor="white", layout=layout)
    grid = figure.add_gridspec(3, 3, height_ratios=(1.0, 1.35, 0.62))
    _plot_reconstruction(figure.add_subplot(grid[0, 0]), results.autoencoder)
    _plot_energy(figure.add_subplot(grid[0, 1]), results.calm.run)
    _plot_bits(figure.add_subplot(grid[0, 2]), results.baseline.run)
    _plot_brier(figure.add_subplot(grid[1, :2]), (results.calm, results.baseline))
    _plot_final(figure.add_subplot(grid[1, 2]), results)
    _write_samples(figure.add_subplot(grid[2, :]), results)
    figure.suptitle(
        "A CALM from nothing", x=0.008, ha="left", color=INK, fontsize=17, fontweight="bold"
    )
    summary = f"{results.text}  ·  {results.machine}  ·  {results.seconds:.0f} s in total"
    figure.text(0.992, 0.978, summary, ha="right", va="top", color=MUTED, fontsize=9)
    with warnings.catch_warnings():
        # The font may lack letters of the user's text; the samples then show boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path)


def _over_time(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training", loc="right", color=MUTED, fontsize=8.5)


def _curve(run: StageRun, name: str) -> tuple[list[float], list[float]]:
    """Seconds of training, and the values logged at them."""
    entries = [entry for entry in run.logs if name in entry and "train_seconds" in entry]
    return [entry["train_seconds"] for entry in entries], [entry[name] for entry in entries]


def _plot_reconstruction(axes: Axes, run: StageRun) -> None:
    style_axes(axes, "Autoencoder", "held-out tokens not reconstructed, %")
    seconds = [score["train_seconds"] for score in run.scores]
    errors = [max(100 * (1 - score["accuracy"]), 1e-3) for score in run.scores]
    axes.semilogy(seconds, errors, "o-", color=VIOLET, markersize=3.5, linewidth=1.8)
    axes.text(
        0.98, 0.95, f"{100 * run.scores[-1]['accuracy']:.2f} % reconstructed", ha="right", va="top",
        transform=axes.transAxes, color=VIOLET, fontsize=9, fontweight="bold",
    )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:g}")
    _over_time(axes)


def _plot_energy(axes: Axes, run: StageRun) -> None:
    """The energy loss alone, without terms that train beside it; the loss of another head."""
    seconds, loss = _curve(run, "loss")
    note = "training loss"
    if (fidelity := _curve(run, "fidelity")[1]) and (diversity := _curve(run, "diversity")[1]):
        loss = [near - far for near, far in zip(fidelity, diversity, strict=True)]
        note = "energy loss: distance to the text − distance among draws"
    style_axes(axes, "CALM", note)
    axes.plot(seconds, loss, color=TEAL, linewidth=1.8)
    _over_time(axes)


def _plot_bits(axes: Axes, run: StageRun) -> None:
    style_axes(axes, "Token by token", "cross-entropy, bits a token")
    seconds, loss = _curve(run, "loss")
    bits = [value / math.log(2) for value in loss]
    axes.plot(seconds, bits, color=ORANGE, linewidth=1.8)
    _over_time(axes)


def _plot_brier(axes: Axes, models: Sequence[LanguageModelResults]) -> None:
    style_axes(
        axes, "The next 1, 2, 3 and 4 tokens",
        "Brier-n of held-out text, %, with two standard errors; numbers say which n",
    )  # fmt: skip
    for model, color, line, shift in zip(
        models, (TEAL, ORANGE), ("-", (0, (3, 1.5))), (6, 18), strict=True
    ):
        for order, shade in zip(ORDERS, SHADES, strict=True):
            name = f"brier{order}"
            points = [score for score in model.run.scores if 100 * score[name] > SMALLEST]
            if not points:
                continue
            seconds = [score["train_seconds"] for score in points]
            values = [100 * score[name] for score in points]
            spread = [200 * score.get(f"{name}_se", 0.0) for score in points]
            axes.errorbar(
                seconds, values, yerr=spread, color=color, alpha=shade, linestyle=line,
                linewidth=1.8, marker="o", markersize=3, elinewidth=0.9,
            )  # fmt: skip
            axes.annotate(
                f"{order}", (seconds[-1], values[-1]), xytext=(shift, 0), va="center", color=color,
                textcoords="offset points", fontsize=9, fontweight="bold",
            )  # fmt: skip
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom=max(SMALLEST, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter("{x:g}")
    _over_time(axes)


def _plot_final(axes: Axes, results: DemoResults) -> None:
    models = results.models
    colors = (TEAL, VIOLET, ORANGE) if results.readout else (TEAL, ORANGE)
    width = 0.8 / len(models)
    style_axes(axes, "At the end", "Brier-n of held-out text, %, with 95 % intervals")
    for place, (model, color) in enumerate(zip(models, colors, strict=True)):
        values = [100 * model.evaluation.brier[f"brier{order}"] for order in ORDERS]
        places = [order + width * (place - (len(models) - 1) / 2) for order in ORDERS]
        bars = axes.bar(places, values, width=0.9 * width, color=color, label=model.name)
        intervals = model.evaluation.brier_intervals
        if intervals is not None:
            ends = [intervals[f"brier{order}"] for order in ORDERS]
            low = [value - 100 * end[0] for value, end in zip(values, ends, strict=True)]
            high = [100 * end[1] - value for value, end in zip(values, ends, strict=True)]
            axes.errorbar(places, values, yerr=[low, high], fmt="none", color=INK, elinewidth=1)
        axes.bar_label(bars, fmt="%.1f", padding=4, color=color, fontsize=17 / len(models))
    axes.margins(y=0.12)
    axes.set_xticks(ORDERS, [f"{order} token{'s' if order > 1 else ''}" for order in ORDERS])
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _write_samples(axes: Axes, results: DemoResults) -> None:
    """What each model writes at its lowest temperature after the first prompt."""
    axes.set_axis_off()
    drawn = (results.readout, VIOLET) if results.readout else (results.calm, TEAL)
    columns = (drawn, (results.baseline, ORANGE))
    for (model, color), left in zip(columns, (0.0, 0.51), strict=True):
        sample = min(model.samples, key=lambda sample: sample.temperature)
        lines = textwrap.wrap(_printable(sample.prompt + sample.continuation), SAMPLE_WIDTH)
        style: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "parse_math": False}
        heading = f"{model.name}, T = {temperature_name(sample.temperature)}"
        axes.text(left, 1.0, heading, color=color, fontsize=10, fontweight="bold", **style)
        axes.text(
            left, 0.8, "\n".join(lines[:SAMPLE_LINES]), color=INK, fontsize=8.8,
            family="monospace", linespacing=1.35, **style,
        )  # fmt: skip


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
