"""Sizes, chunk sizes and budgets: which K is best for the same training FLOPs (paper, figure 4).

Every arm reads the same bytes, without start chunks, and is scored on the same n-grams: those that
start at multiples of the largest K.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.experiments.experiment import BRIER_COLUMNS, Cell, Experiment, Panel, Result
from calm.experiments.scales import Scale

__all__ = ["SCALING", "best_arms", "fit_scores"]

TOKENS = "token baseline"
SCORE = "held-out/brier1"
RESAMPLES, SEED = 2000, 0


def _cells(scale: Scale, seed: int) -> list[Cell]:
    chunk_sizes = scale.grid["chunk_sizes"]
    cells = []
    for budget, names in scale.grid["budgets"]:
        for name, calm, baseline in scale.grid["sizes"]:
            if name not in names:
                continue
            models = {TOKENS: scale.baseline(seed, config_overrides=baseline)}
            for size in chunk_sizes:
                models[f"K = {size}"] = _calm(scale, seed, size, calm)
            for arm, training in models.items():
                cells.append(
                    Cell(
                        {"arm": arm, "size": name, "budget": budget},
                        scale.at_budget(training, budget),
                        options={"multiples_of": max(chunk_sizes)},
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
    """For each budget its best arm, the difference to the next one, and how sure that is.

    The size of an arm is chosen on every other stretch of the text, and the arms are compared on
    the others: ``difference`` of Brier-1 to the second best with its 95 % bootstrap interval, and
    ``share`` of the resampled texts on which the same arm is best.
    """
    rows = []
    for budget in sorted({result.labels["budget"] for result in results}):
        chosen = _chosen_sizes([r for r in results if r.labels["budget"] == budget])
        names = list(chosen)
        tables = np.stack([_table(chosen[name])[1::2] for name in names])  # [arms, groups, 2]
        means = _means(tables.sum(1))
        first, second = np.argsort(-means)[:2]
        draws = np.random.default_rng(SEED).integers(
            tables.shape[1], size=(RESAMPLES, tables.shape[1])
        )
        resampled = _means(tables[:, draws].sum(2))  # [arms, resamples]
        difference = resampled[first] - resampled[second]
        rows.append({
            "budget": budget, "best": names[first], "size": chosen[names[first]].labels["size"],
            "score": means[first], "second": names[second],
            "difference": means[first] - means[second],
            "interval": np.quantile(difference, [0.025, 0.975]).tolist(),
            "share": float((resampled.argmax(0) == first).mean()),
        })  # fmt: skip
    return rows


def _chosen_sizes(results: Sequence[Result]) -> dict[str, Result]:
    """The best size of each arm on the even stretches of the text; of the first seed."""
    chosen: dict[str, Result] = {}
    for result in sorted(results, key=lambda each: each.seed):
        arm, score = result.labels["arm"], float(_means(_table(result)[::2].sum(0)))
        if arm not in chosen or score > float(_means(_table(chosen[arm])[::2].sum(0))):
            chosen[arm] = result
    return chosen


def _table(result: Result) -> np.ndarray:
    """Sum of Brier-1 and count of each stretch, ``[groups, 2]``."""
    return np.array(result.groups["held-out/brier"])[:, [0, -1]]


def _means(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def fit_scores(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Brier-1 = a + b log₁₀ parameters + c log₁₀ bytes, for each arm, by least squares.

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
    lines = [
        "Best arm of each budget; its size is chosen on every other stretch of the text, arms are "
        "compared on the rest:\n",
        "| training FLOPs | best | size | Brier-1, % | next | difference, 95 % | how often best |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in best_arms(results):
        low, high = (100 * end for end in row["interval"])
        lines.append(
            f"| {row['budget']:.2e} | {row['best']} | {row['size']} | {100 * row['score']:.2f} | "
            f"{row['second']} | {100 * row['difference']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{row['share']:.2f} |"
        )
    lines += [
        "\nBrier-1 = a + b log₁₀ parameters + c log₁₀ bytes, the largest budget held out:\n",
        "| arm | cells | a | b | c | residual, points | held-out residual |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in fit_scores(results):
        a, b, c = row["weights"]
        lines.append(
            f"| {row['arm']} | {row['cells']} | {a:.3f} | {b:.4f} | {c:.4f} | "
            f"{100 * row['residual']:.2f} | {100 * row['held_out']:.2f} |"
        )
    return "\n".join(lines)


SCALING = Experiment(
    name="scaling",
    question="Which chunk size K is best for the same training FLOPs, and does that change?",
    cells=_cells,
    columns=("parameters", "training_tokens", "training_flops", "inference_flops", *BRIER_COLUMNS),
    panels=lambda scale: [
        Panel("Training", "training_flops", SCORE, line="arm", log_x=True, is_frontier=True,
              note="best Brier-1 of each budget over training FLOPs"),
        Panel("Inference", "inference_flops", SCORE, line="arm", log_x=True,
              where={"budget": scale.grid["budgets"][-1][0]},
              note="Brier-1 over FLOPs a generated byte, largest budget"),
    ],
    analysis=_analysis,
)  # fmt: skip
