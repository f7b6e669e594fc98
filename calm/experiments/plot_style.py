"""Colours and axes that all figures share."""

from matplotlib.axes import Axes

__all__ = ["GRID", "INK", "LINES", "MUTED", "ORANGE", "TEAL", "VIOLET", "style_axes"]

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TEAL, ORANGE, VIOLET = "#0f766e", "#c2410c", "#4f46e5"
LINES = (TEAL, ORANGE, VIOLET, "#be185d", "#0369a1", "#4d7c0f", INK, "#b45309")  # in this order


def style_axes(axes: Axes, title: str, note: str) -> None:
    """A title, a note below it, a horizontal grid, no frame."""
    axes.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=20)
    text = axes.annotate(
        note, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
        color=MUTED, fontsize=8.5, va="bottom",
    )  # fmt: skip
    text.set_in_layout(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=0)
