"""Whether results agree with a claim that one cell is better than another.

A claim is judged on Brier-1, Brier-2 and, where the cells share an autoencoder, the held-out energy
score, each as a difference that is paired by stretches of the text and averaged over seeds. It
agrees if no metric contradicts it and one supports it by more than two standard errors, disagrees
in the opposite case, and cannot be told otherwise. Several seeds add the spread between them to the
standard error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from calm.errors import UserError
from calm.experiments.experiment import Claim, Result

__all__ = ["Difference", "Verdict", "difference", "judge", "select"]

SURE = 2.0  # standard errors
# Column of the groups of each metric, and whether higher is better.
METRICS = {
    "brier1": ("brier", 0, 1),
    "brier2": ("brier", 1, 1),
    "brier3": ("brier", 2, 1),
    "brier4": ("brier", 3, 1),
    "energy": ("energy", 0, -1),
}


class Verdict(StrEnum):
    """What results say of a claim."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    UNTOLD = "cannot be told"


@dataclass(frozen=True)
class Difference:
    """How much better one cell is than another, in a metric; positive is better.

    Attributes:
        metric: which one.
        value: mean over seeds.
        error: standard error, over stretches of the text and, with several seeds, between them.
        seeds: how many.
    """

    metric: str
    value: float
    error: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if it is surely not zero, else 0."""
        if not abs(self.value) > SURE * self.error:
            return 0
        return 1 if self.value > 0 else -1

    def __str__(self) -> str:
        return f"{self.metric} {self.value:+.4f} ± {self.error:.4f}"


def select(results: Sequence[Result], labels: Mapping[str, Any]) -> list[Result]:
    """The results of all seeds of the one cell with these labels, sorted by seed.

    Raises:
        UserError: no cell has them, or several have.
    """
    found = [result for result in results if result.matches(labels)]
    if len({tuple(sorted(map(str, result.labels.items()))) for result in found}) != 1:
        named = ", ".join(f"{name} {value}" for name, value in labels.items())
        raise UserError(f"{len(found)} results have {named}; one cell is needed")
    return sorted(found, key=lambda result: result.seed)


def judge(
    claim: Claim, results: Sequence[Result], text: str = "held-out"
) -> tuple[Verdict, list[Difference]]:
    """The verdict on `claim`, and the differences that it rests on."""
    better, worse = select(results, claim.better), select(results, claim.worse)
    found = [difference(better, worse, metric, text) for metric in claim.metrics]
    signs = {each.sign for each in found}
    if 1 in signs and -1 not in signs:
        return Verdict.AGREES, found
    if -1 in signs and 1 not in signs:
        return Verdict.DISAGREES, found
    return Verdict.UNTOLD, found


def difference(
    better: Sequence[Result], worse: Sequence[Result], metric: str, text: str = "held-out"
) -> Difference:
    """How much better `better` is than `worse`, over the seeds that both have.

    With one seed the error is that of the text alone.
    """
    name, column, sign = METRICS[metric]
    others = {result.seed: result for result in worse}
    pairs = [(one, others[one.seed]) for one in better if one.seed in others]
    if not pairs:
        raise UserError(f"no seed is shared by {better[0].labels} and {worse[0].labels}")
    key = f"{text}/{name}"
    values, errors = zip(
        *(_paired(_table(one, key), _table(other, key), column) for one, other in pairs),
        strict=True,
    )
    count = len(pairs)
    spread = torch.tensor(values).double().var().item() if count > 1 else 0.0
    error = math.sqrt(max(spread, sum(each**2 for each in errors) / count) / count)
    return Difference(metric, sign * sum(values) / count, error, count)


def _table(result: Result, key: str) -> Tensor:
    if key not in result.groups:
        raise UserError(f"{result.labels} has no {key}; it has {', '.join(result.groups)}")
    return torch.tensor(result.groups[key], dtype=torch.float64)


def _paired(one: Tensor, other: Tensor, column: int) -> tuple[float, float]:
    """Difference of the means of a column, and its standard error, that of a ratio of sums."""
    if len(one) != len(other) or not torch.equal(one[:, -1], other[:, -1]):
        raise UserError("two results were not scored at the same positions")
    counts, values = one[:, -1], one[:, column] - other[:, column]
    mean = values.sum() / counts.sum()
    if len(counts) < 2:
        return mean.item(), math.inf
    residuals = values - counts * mean
    scale = len(counts) / (len(counts) - 1)
    return mean.item(), ((residuals.square().sum() * scale).sqrt() / counts.sum()).item()
