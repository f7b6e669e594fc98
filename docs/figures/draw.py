"""The figures of docs/concepts.md, with numbers that the operations compute.

    python docs/figures/draw.py [FOLDER]

Every run writes the same files. Text stays text, so that they are small and can be searched.
"""

import sys
from collections.abc import Callable
from math import comb
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from calm.experiments.plot_style import GRID, INK, MUTED, ORANGE, TEAL, VIOLET, style_axes
from calm_kernels import gaussian_energy_score
from calm_kernels.agreeing_patch import vote_chances

__all__ = ["FIGURES", "draw"]

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "calm-lm", "font.size": 9.0}
TOKENS = ("The", "energy", "score", "is", "proper", ",", "so", "that", "draws", "teach", "it", ".")
CHUNKS = ("the cat", "a dog", "one owl", "his hen", "my fox", "no elk")
CHANCES = torch.tensor((0.40, 0.25, 0.15, 0.10, 0.06, 0.04), dtype=torch.float64)


def _box(axes: Axes, x: float, y: float, text: str, width: float, color: str) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, 0.6, boxstyle=style, fc="white", ec=color, lw=1.4))
    axes.text(x + width / 2, y + 0.3, text, ha="center", va="center", color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color))


def chunk() -> Figure:
    """Four tokens become one latent; a model of chunks makes a quarter of the steps."""
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 13), ylim=(0, 4.9), aspect="equal")
    axes.axis("off")
    for place, token in enumerate(TOKENS):
        first = 0.5 + place + 0.15 * (place // 4)
        _box(axes, first, 4.0, token, 0.92, MUTED)
    for number in range(3):
        left = 0.5 + 4.15 * number
        middle = left + 1.96
        _arrow(axes, (middle, 3.9), (middle, 3.15), TEAL)
        axes.text(middle + 0.15, 3.5, "encoder", color=TEAL, va="center")
        for radius, alpha in ((0.52, 0.15), (0.34, 0.3), (0.16, 0.9)):
            axes.add_patch(Circle((middle, 2.55), radius, color=TEAL, alpha=alpha, lw=0))
        axes.text(middle + 0.62, 2.55, f"$z_{number + 1}$", color=INK, va="center", fontsize=11)
        _box(axes, left, 1.0, f"state $h_{number + 1}$ of the Transformer", 3.92, VIOLET)
        _arrow(axes, (left + 0.46, 3.9), (left + 0.46, 1.65), VIOLET)
        axes.text(left + 0.6, 3.5, "embed", color=VIOLET, va="center")
        if number < 2:
            _arrow(axes, (left + 3.6, 1.65), (left + 5.55, 2.4), ORANGE)
            axes.text(left + 3.75, 2.0, "head", color=ORANGE, va="center", ha="right")
    notes = (
        "12 tokens, K = 4: 3 steps of the Transformer, not 12. The head draws the next latent",
        "and the decoder turns it into four tokens. Latents of the encoder teach the head.",
    )
    for row, note in enumerate(notes):
        axes.text(0.5, 0.45 - 0.4 * row, note, color=MUTED)
    return figure


def energy_score() -> Figure:
    """Draws of four models of a two-sided distribution, with the terms of their energy loss."""
    generator = torch.Generator().manual_seed(2)
    count, spread = 400, 0.3
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    sides = centres[torch.randint(2, (count,), generator=generator)]
    models = {
        "as the truth": sides + normal(spread),
        "always the middle": normal(0.02),
        "one side only": centres[1] + normal(spread),
        "too wide": sides + normal(1.2),
    }
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    for axes, (name, draws) in zip(figure.subplots(1, 4), models.items(), strict=True):
        _, terms = gaussian_energy_score(
            draws[:, None], centres[:, None], torch.full((2, 1, 2), spread).log().double(),
            target_weights=torch.full((2, 1), 0.5, dtype=torch.float64), return_diagnostics=True,
        )  # fmt: skip
        fidelity, diversity = terms.fidelity.item(), terms.diversity.item()
        for centre in centres.tolist():
            for deviations in (2.0, 1.0):
                axes.add_patch(
                    Circle(tuple(centre), deviations * spread, color=MUTED, alpha=0.3, lw=0)
                )
        axes.plot(
            *draws[:70].T.tolist(), "o", markersize=3, color=TEAL, alpha=0.7, markeredgewidth=0
        )
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
        axes.set_title(name, fontsize=10, fontweight="bold", color=INK)
        axes.set_xlabel(f"{fidelity:.2f} − {diversity:.2f} = {fidelity - diversity:.2f}", color=INK)
        for spine in axes.spines.values():
            spine.set_color(GRID)
    figure.suptitle(
        "energy loss = fidelity − diversity, least for the truth (grey); dots are draws of a model",
        fontsize=9, color=MUTED,
    )  # fmt: skip
    return figure


def _one_vote(axes: Axes) -> None:
    """Ten draws, counted, and the chance of each to be chosen at T = 1/2."""
    draws = torch.tensor([0, 1, 0, 2, 0, 1, 3, 0, 1, 4])
    chances = vote_chances(draws.view(1, -1, 1), 2)[0]
    style_axes(
        axes, "One vote at T = 1/2", "ten draws; a chunk drawn c times has C(c, 2) agreeing pairs"
    )
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(5, -0.2))
    for row in range(5):
        is_drawn = draws == row
        number, share = int(is_drawn.sum()), chances[is_drawn].sum().item()
        axes.text(0, row + 0.5, CHUNKS[row], va="center", color=INK)
        places = [2.6 + 0.75 * place for place in range(number)]
        axes.plot(places, [row + 0.5] * number, "o", color=TEAL, markersize=11)
        said = f"C({number}, 2) = {comb(number, 2)}: chosen with {share:.0%}"
        axes.text(5.6, row + 0.5, said, va="center", color=INK if share else MUTED)


def vote() -> Figure:
    """One vote, and what votes among ever more draws choose."""
    figure = Figure(figsize=(8.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _one_vote(left)
    generator = torch.Generator().manual_seed(0)
    bars = {"draws of the model, P": CHANCES}
    for number in (4, 20, 200):
        draws = torch.multinomial(CHANCES, 1000 * number, True, generator=generator)
        candidates = draws.view(1000, number, 1)
        chances = vote_chances(candidates, 2)
        chosen = [(chances * (candidates[..., 0] == place)).sum(1).mean() for place in range(6)]
        bars[f"vote among {number}"] = torch.stack(chosen)
    bars["P² / Σ P²"] = CHANCES**2 / (CHANCES**2).sum()
    style_axes(right, "Which chunk comes out", "share of votes at T = 1/2, over 1,000 votes")
    colors = (MUTED, "#99d5cf", "#3ba197", TEAL, ORANGE)
    for place, ((name, heights), color) in enumerate(zip(bars.items(), colors, strict=True)):
        where = [number + 0.16 * (place - 2) for number in range(6)]
        right.bar(where, heights.tolist(), 0.15, label=name, color=color)
    right.set_xticks(range(6), CHUNKS)
    right.legend(frameon=False, fontsize=8.5)
    return figure


def brier() -> Figure:
    """Hits and collisions of models that are flatter or sharper than the truth."""
    figure = Figure(figsize=(8.2, 3.0), layout="constrained")
    axes = figure.subplots()
    sharpness = torch.linspace(0, 4, 81, dtype=torch.float64)
    models = CHANCES ** sharpness[:, None]
    models = models / models.sum(1, keepdim=True)
    hits, collisions = 2 * (models * CHANCES).sum(1), (models**2).sum(1)
    note = "of draws x, x' of a model q ∝ p^s and the text y of p: right at s = 1"
    style_axes(axes, "Brier-1 = 2 · P(x = y) − P(x = x')", note)
    lines = (("hits, 2 · P(x = y)", hits, VIOLET), ("collisions, P(x = x')", collisions, ORANGE),
             ("their difference", hits - collisions, TEAL))  # fmt: skip
    for name, values, color in lines:
        axes.plot(sharpness.tolist(), values.tolist(), color=color, label=name, linewidth=2)
    best = int((hits - collisions).argmax())
    axes.plot(sharpness[best].item(), (hits - collisions)[best].item(), "o", color=TEAL)
    axes.set_xlabel("s: the model's sharpness (0 draws any chunk, 4 hardly but the likeliest)")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "chunk": chunk, "energy_score": energy_score, "vote": vote, "brier": brier,
}  # fmt: skip


def draw(folder: Path, ending: str = "svg") -> None:
    """Write all figures to `folder`."""
    with matplotlib.rc_context(STYLE):
        for name, figure in FIGURES.items():
            plain = {"metadata": {"Date": None, "Creator": None}} if ending == "svg" else {}
            figure().savefig(folder / f"{name}.{ending}", dpi=110, **plain)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
