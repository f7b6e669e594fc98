"""Arms of an isoFLOP grid: which is best for each budget, whether that changes, and a fit.

The size of an arm and the order of the arms are chosen on every other stretch of the text; arms are
compared on the others. Scores are Brier-1, means over seeds. Resampled are stretches of the text,
the same ones for every arm and budget; the variance between seeds, pooled over all cells that have
several, is added as normal noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from calm.experiments.experiment import Result
from calm.experiments.verdicts import SeedSpread, by_cell, seed_spread, stretches

__all__ = ["TOKENS", "Arms", "Gap", "arms_of_budgets", "change", "fit_scores"]

TOKENS = "token baseline"
SCORE = "held-out/brier1"
RESAMPLES, SEED = 2000, 0


class Gap(NamedTuple):
    """A difference of scores with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if 0 is outside the interval, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        """In points of a percentage."""
        return f"{100 * self.value:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


@dataclass(frozen=True)
class Arms:
    """The arms of one budget, each with its best size, from best to worst.

    Attributes:
        budget: training FLOPs.
        names: of the arms.
        sizes: of each arm.
        scores: of each arm, ``[arms]``.
        resampled: likewise of each resample, ``[arms, RESAMPLES]``.
    """

    budget: float
    names: list[str]
    sizes: list[str]
    scores: np.ndarray
    resampled: np.ndarray

    def gap(self, one: str, other: str) -> Gap:
        """Score of one arm minus that of another."""
        return _gap(*self.lead(one, other))

    @property
    def share(self) -> float:
        """How often the first arm is the best of all."""
        return float((self.resampled.argmax(0) == 0).mean())

    def lead(self, one: str, other: str) -> tuple[float, np.ndarray]:
        """The same difference, and that of each resample, ``[RESAMPLES]``."""
        first, second = self.names.index(one), self.names.index(other)
        resampled = self.resampled[first] - self.resampled[second]
        return float(self.scores[first] - self.scores[second]), resampled


def arms_of_budgets(results: Sequence[Result]) -> list[Arms]:
    """The arms of each budget, from the smallest budget to the largest."""
    spread = seed_spread(results, "brier1")
    budgets = sorted({result.labels["budget"] for result in results})
    return [
        _arms([result for result in results if result.labels["budget"] == budget], spread, place)
        for place, budget in enumerate(budgets)
    ]


def change(small: Arms, large: Arms, one: str, other: str) -> Gap:
    """How much more arm `one` leads arm `other` with the large budget than with the small one."""
    before, resampled_before = small.lead(one, other)
    after, resampled_after = large.lead(one, other)
    return _gap(after - before, resampled_after - resampled_before)


def _gap(value: float, resampled: np.ndarray) -> Gap:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Gap(value, float(low), float(high))


def _arms(results: Sequence[Result], spread: SeedSpread, place: int) -> Arms:
    cells = _best_sizes(results)
    names = sorted(cells, key=lambda arm: -_score(_table(cells[arm])[::2].sum(0)))
    tables = np.stack([_table(cells[arm])[1::2] for arm in names])  # [arms, stretches, 2]
    draws = np.random.default_rng(SEED).integers(tables.shape[1], size=(RESAMPLES, tables.shape[1]))
    deviation = np.sqrt([spread.variance / len(cells[arm]) for arm in names])
    noise = np.random.default_rng([SEED, place]).standard_normal((len(names), RESAMPLES))
    return Arms(
        budget=results[0].labels["budget"],
        names=names,
        sizes=[cells[arm][0].labels["size"] for arm in names],
        scores=_score(tables.sum(1)),
        resampled=_score(tables[:, draws].sum(2)) + deviation[:, None] * noise,
    )


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
