"""The figure of `calm experiment gap`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from calm.experiments.gap_losses import Gap
from calm.experiments.gap_report import NAMES
from calm.experiments.plot_style import INK, MUTED, ORANGE, TEAL, VIOLET, style_axes

__all__ = ["plot_gap"]

COLORS = {"baseline": INK, "causal": TEAL, "independent": ORANGE, "own": MUTED, "draws": VIOLET}


def plot_gap(gap: Gap, path: Path) -> None:
    """BrierLM of what was scored; over the spread of the noise; shares slot by slot."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
    figure = Figure(figsize=(13.5, 4.6), dpi=140, facecolor="white", layout=layout)
    scores, spreads, slots = figure.subplots(1, 3)
    _draw_scores(scores, gap)
    _draw_spreads(spreads, gap)
    _draw_slots(slots, gap)
    figure.savefig(path)


def _draw_scores(axes: Axes, gap: Gap) -> None:
    style_axes(axes, "Trunk and head", "BrierLM on the same n-grams, 95 % intervals")
    shown = [name for name in NAMES if name in gap.scores]
    for place, name in enumerate(shown):
        found = gap.scores[name]
        value, (low, high) = found.difference["brier_lm"], found.interval["brier_lm"]
        axes.bar([place], [value], color=COLORS[name], width=0.62)
        axes.errorbar(
            [place], [value], yerr=[[value - low], [high - value]], color=MUTED, capsize=3
        )
    axes.set_xticks(
        range(len(shown)), [NAMES[name].replace(", ", ",\n") for name in shown], fontsize=8
    )


def _draw_spreads(axes: Axes, gap: Gap) -> None:
    found = gap.losses.dispersion
    style_axes(axes, "Dispersion", "BrierLM, on the half of the text that chooses")
    values = [entry["brier_lm"] for entry in found.values.values()]
    axes.plot(list(found.values), values, color=VIOLET, marker="o", markersize=4.5, linewidth=1.6)
    axes.axvline(found.chosen, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xlabel("noise_spread (dotted: chosen)", color=MUTED, fontsize=8.5)


def _draw_slots(axes: Axes, gap: Gap) -> None:
    style_axes(axes, "Tokens of a chunk", "%, draws that are the text, and pairs that agree (dots)")
    places = list(range(1, gap.patch_size + 1))
    for name, found in gap.slots.items():
        match, collision = (
            [100 * found.difference[f"{what}{slot}"] for slot in places]
            for what in ("match", "collision")
        )
        axes.plot(places, match, color=COLORS[name], linewidth=1.6, label=NAMES[name])
        axes.plot(places, collision, color=COLORS[name], marker="o", linestyle=":", linewidth=1)
    axes.set_xticks(places)
    axes.set_xlabel("token of the chunk", color=MUTED, fontsize=8.5)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
