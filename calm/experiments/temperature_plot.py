"""The figure of `calm experiment temperature`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from calm.experiments.plot_style import INK, LINES, MUTED, ORANGE, TEAL, VIOLET, style_axes
from calm.experiments.temperature_measures import Result, Study

__all__ = ["plot_study"]

COLORS = {
    "direct": VIOLET, "batch": TEAL, "medoid": ORANGE, "exact": INK, "amortized": LINES[3],
    "readout": LINES[4],
}  # fmt: skip
MARKERS = {
    "direct": "s", "batch": "o", "medoid": "^", "exact": "D", "amortized": "P", "readout": "X",
}  # fmt: skip
LIGHTEST = 0.35
LABELLED_TEMPERATURES = (1.0, 0.5, 0.1)  # of scaled noise; labels would overlap otherwise


def plot_study(study: Study, path: Path) -> None:
    """Accuracy over collision, and over the time of a chunk; a line for each method and N."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.05)
    figure = Figure(figsize=(12.5, 5.8), dpi=140, facecolor="white", layout=layout)
    left, right = figure.subplots(1, 2, sharey=True)
    style_axes(
        left, "Accuracy and diversity", "draws that are the text, %, over pairs of draws that agree"
    )
    style_axes(right, "Accuracy and cost", "draws that are the text, %, over milliseconds a chunk")
    for axes, cost in ((left, False), (right, True)):
        for name, results in _lines(study):
            _draw(axes, name, results, cost)
    left.set_xlabel("pairs of draws that agree, % (right: less diverse)", color=MUTED, fontsize=8.5)
    right.set_xlabel("ms to choose a chunk, one sequence", color=MUTED, fontsize=8.5)
    right.set_xscale("log")
    right.legend(frameon=False, labelcolor=INK, fontsize=8.5, loc="lower right")
    figure.savefig(path)


def _lines(study: Study) -> list[tuple[str, list[Result]]]:
    """Name and results of each line: a vote over T at each N, medoids over N, single draws over T.

    Single draws begin with the model itself, at T = 1. The draw without noise is a single point.
    """

    def name(result: Result) -> str:
        setting = result.setting
        match setting.method:
            case "batch":
                return f"vote among {setting.num_samples}, over T"
            case "medoid":
                return "medoid, over N"
            case "direct" if setting.noise_scale == 0:
                return "no noise"
            case "direct" | "noise_scale":
                return "noise scaled, one draw, over T"
            case _:
                return f"{setting.method}, over T"

    lines: dict[str, list[Result]] = {}
    for result in study.results:
        lines.setdefault(name(result), []).append(result)
    return list(lines.items())


def _draw(axes: Axes, name: str, results: list[Result], is_cost: bool) -> None:
    method = results[0].setting.method
    across = [result.milliseconds if is_cost else 100 * result.collision for result in results]
    accuracy = [100 * result.accuracy for result in results]
    alpha = _shade(results[0]) if method == "batch" else 1.0
    axes.plot(
        across, accuracy, color=COLORS[method], marker=MARKERS[method], markersize=4.5,
        linewidth=1.6, label=name, alpha=alpha,
    )  # fmt: skip
    for result, place, height in zip(results, across, accuracy, strict=True):
        setting = result.setting
        if method == "direct" and setting.temperature not in LABELLED_TEMPERATURES:
            continue
        axes.annotate(
            _label(result), (place, height), xytext=(4, -9), textcoords="offset points",
            color=COLORS[method], fontsize=6.5, alpha=max(alpha, 0.6),
        )  # fmt: skip


def _shade(result: Result) -> float:
    """Opacity of a vote: more with more candidates."""
    return min(1.0, LIGHTEST + 0.0032 * result.setting.num_samples)


def _label(result: Result) -> str:
    setting = result.setting
    match setting.method:
        case "medoid":
            return f"N={setting.num_samples}"
        case "direct" if setting.noise_scale == 0:
            return "no noise"
        case _:
            return f"T={setting.temperature:.2g}"
