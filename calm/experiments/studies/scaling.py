"""Sizes, chunk sizes and budgets: which K is best for the same training FLOPs (paper, figure 4).

Every arm reads the same bytes, without start chunks, and is scored on the same n-grams: those that
start at multiples of the largest K, and of 8 tokens at least.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Experiment, Panel, Result
from calm.experiments.scales import Scale
from calm.experiments.verdicts import SeedSpread, by_cell, seed_spread, stretches

__all__ = ["SCALING", "best_arms", "fit_scores"]

EVERY = 8  # tokens between n-grams, at least: places at which every arm scores one, in any block
TOKENS = "token baseline"
SCORE = "held-out/brier1"
RESAMPLES, SEED = 2000, 0


def _cells(scale: Scale, seed: int) -> list[Cell]:
    chunk_sizes = scale.grid.chunk_sizes
    cells = []
    for flops, names in scale.grid.budgets:
        for size in scale.grid.sizes:
            if size.name not in names:
                continue
            models = {TOKENS: scale.baseline(seed, config_overrides=size.baseline)}
            models |= {f"K = {k}": _calm(scale, seed, k, size.calm) for k in chunk_sizes}
            for arm, training in models.items():
                cells.append(
                    Cell(
                        {"arm": arm, "size": size.name, "budget": flops},
                        scale.at_budget(training, flops),
                        options={"multiples_of": max(EVERY, *chunk_sizes)},
                        seed=seed,
                    )
                )
    return cells


def _calm(scale: Scale, seed: int, chunk_size: int, overrides: Mapping[str, Any]) -> Any:
    """A CALM on an autoencoder of its own, whose latent grows with K as in the paper."""
    reference = scale.autoencoder().flags["config_overrides"]
    width = int(reference.get("latent_size", 128)) // int(reference.get("patch_size", 4))
    autoencoder = scale.autoencoder(
        config_overrides={"patch_size": chunk_size, "latent_size": chunk_size * width}
    )
    return scale.calm(seed, autoencoder, config_overrides={**overrides, "has_start_patch": False})


def best_arms(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each budget which arm is best, by how much, and how sure that is.

    The size of an arm and the order of the arms are chosen on every other stretch of the text; the
    arms are compared on the others. Scores are means over seeds. ``difference`` is that of Brier-1
    to the second arm with its 95 % bootstrap interval, ``share`` how often the first arm is best of
    all, ``to_tokens`` each other arm's difference to the token baseline, likewise with interval.
    Resampled are stretches of the text; the variance between seeds, pooled over all cells that have
    several, is added as normal noise.
    """
    spread = seed_spread(results, "brier1")
    return [
        {"budget": budget, **_compare([r for r in results if r.labels["budget"] == budget], spread)}
        for budget in sorted({result.labels["budget"] for result in results})
    ]


def _compare(results: Sequence[Result], spread: SeedSpread) -> dict[str, Any]:
    """The arms of one budget."""
    sizes = _best_sizes(results)
    arms = sorted(sizes, key=lambda arm: -_score(_table(sizes[arm])[::2].sum(0)))
    tables = np.stack([_table(sizes[arm])[1::2] for arm in arms])  # [arms, stretches, 2]
    generator = np.random.default_rng(SEED)
    draws = generator.integers(tables.shape[1], size=(RESAMPLES, tables.shape[1]))
    scores = _score(tables.sum(1))
    deviation = np.sqrt([spread.variance / len(sizes[arm]) for arm in arms])
    noise = deviation[:, None] * generator.standard_normal((len(arms), RESAMPLES))
    resampled = _score(tables[:, draws].sum(2)) + noise  # [arms, resamples]

    def versus(one: int, other: int) -> tuple[float, list[float]]:
        ends = np.quantile(resampled[one] - resampled[other], [0.025, 0.975])
        return float(scores[one] - scores[other]), ends.tolist()

    difference, interval = versus(0, 1)
    tokens = arms.index(TOKENS) if TOKENS in arms else None
    return {
        "best": arms[0], "size": sizes[arms[0]][0].labels["size"], "score": float(scores[0]),
        "second": arms[1], "difference": difference, "interval": interval,
        "share": float((resampled.argmax(0) == 0).mean()),
        "to_tokens": {} if tokens is None else {
            arm: versus(place, tokens) for place, arm in enumerate(arms) if place != tokens
        },
    }  # fmt: skip


def _best_sizes(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The cell of each arm's best size on the even stretches of the text."""
    best: dict[str, list[Result]] = {}
    for cell in sorted(by_cell(results), key=lambda cell: _score(_table(cell)[::2].sum(0))):
        best[cell[0].labels["arm"]] = cell
    return best


def _table(cell: Sequence[Result]) -> np.ndarray:
    """Sum of Brier-1 and count of each stretch, means over seeds, ``[stretches, 2]``."""
    tables = [stretches(result, "held-out/brier")[:, [0, -1]].numpy() for result in cell]
    return np.mean(tables, axis=0)


def _score(sums: np.ndarray) -> Any:
    return sums[..., 0] / sums[..., 1]


def fit_scores(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Brier-1 = a + b log₁₀ parameters + c log₁₀ tokens, for each arm, by least squares.

    Fitted without the largest budget, which is held out: ``residual`` is the root mean square on
    the fitted cells, ``held_out`` on the others.
    """
    largest = max(result.labels["budget"] for result in results)
    rows = []
    for arm in dict.fromkeys(result.labels["arm"] for result in results):
        cells = [result for result in results if result.labels["arm"] == arm]
        x = np.array([[1.0, np.log10(cell.values["parameters"]),
                       np.log10(cell.values["training_tokens"])] for cell in cells])  # fmt: skip
        y = np.array([cell.values[SCORE] for cell in cells])
        held_out = np.array([cell.labels["budget"] == largest for cell in cells])
        if (~held_out).sum() <= x.shape[1]:
            continue
        weights, *_ = np.linalg.lstsq(x[~held_out], y[~held_out], rcond=None)
        errors = y - x @ weights
        rows.append({
            "arm": arm, "cells": int((~held_out).sum()), "weights": weights.tolist(),
            "residual": float(np.sqrt(np.square(errors[~held_out]).mean())),
            "held_out": float(np.sqrt(np.square(errors[held_out]).mean())),
        })  # fmt: skip
    return rows


def _analysis(results: Sequence[Result]) -> str:
    budgets = best_arms(results)
    best = [
        f"{row['budget']:.2e} | {row['best']} | {row['size']} | {100 * row['score']:.2f} | "
        f"{row['second']} | {_points(row['difference'], row['interval'])} | {row['share']:.2f}"
        for row in budgets
    ]
    arms = sorted({arm for row in budgets for arm in row["to_tokens"]})
    to_tokens = [
        " | ".join([f"{row['budget']:.2e}", *(_points(*row["to_tokens"][arm]) for arm in arms)])
        for row in budgets if row["to_tokens"]
    ]  # fmt: skip
    fits = []
    for row in fit_scores(results):
        a, b, c = row["weights"]
        fits.append(
            f"{row['arm']} | {row['cells']} | {a:.3f} | {b:.4f} | {c:.4f} | "
            f"{100 * row['residual']:.2f} | {100 * row['held_out']:.2f}"
        )
    parts = [
        "Best arm of each budget. Sizes and the order of arms are chosen on every other stretch of "
        "the text, arms are compared on the rest:",
        _lines("training FLOPs | best | size | Brier-1, % | next | difference, 95 % | "
               "how often best", best),
        "Brier-1 minus that of the token baseline with the same training FLOPs, points with 95 % "
        "interval:",
        _lines(" | ".join(["training FLOPs", *arms]), to_tokens),
        "Brier-1 = a + b log₁₀ parameters + c log₁₀ tokens, the largest budget held out:",
        _lines("arm | cells | a | b | c | residual, points | held-out residual", fits)
        if fits else "too few cells for a fit",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _points(value: float, interval: Sequence[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _lines(titles: str, rows: Sequence[str]) -> str:
    rule = " | ".join(["---"] * (titles.count("|") + 1))
    return "\n".join(f"| {line} |" for line in (titles, rule, *rows))


SCALING = Experiment(
    name="scaling",
    question="Which chunk size K is best for the same training FLOPs, and does that change?",
    cells=_cells,
    columns=("parameters", "training_tokens", "training_flops", "inference_flops", *BRIER_COLUMNS),
    panels=lambda scale: [
        Panel("Training", "budget", SCORE, line="arm", log_x=True, is_frontier=True,
              note="training FLOPs; lines pass the best size"),
        Panel("Inference", "inference_flops", SCORE, line="arm", log_x=True,
              where=[{"budget": scale.grid.budgets[-1].flops}],
              note="largest budget, one draw a chunk"),
    ],
    analysis=_analysis,
    notes="Figure 4 trains every K for equal steps; here arms have equal training FLOPs. FLOPs are "
    "those of the language model: each K has an autoencoder of its own, trained for the recipe's "
    "steps and shared by all seeds. Learning rates are the recipes', tuned at one K and size.",
)  # fmt: skip
