"""Whether results agree with a claim that one cell is better than another.

A claim is judged on Brier-1 and Brier-2 and, where it says so, on the held-out energy score: only
cells that share an autoencoder have comparable ones. Each is a difference at the same places of the
text, with a 95 % interval of two parts:

- the text: the error between `STRETCHES` stretches of it. Stretches of one block would be too
  short, as neighbours belong to one document: the difference of two demo models in Brier-1 had an
  error of 0.64 points between stretches of 256 bytes, of 0.79 between those of 1024.
- training: the variance between seeds, pooled over all cells of an experiment that have several.
  Where none has, the interval is that of the text alone, and another seed may leave it.

A claim agrees if no metric contradicts it and one supports it beyond its interval, disagrees in the
opposite case, and cannot be told otherwise. Each metric of each claim is judged for itself: of 20
differences that are none, about one is called one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm.errors import UserError
from calm.evaluation.bootstrap import corpus_means, standard_errors
from calm.experiments.experiment import Claim, Result, Verdict
from calm.experiments.naming import factor, title

__all__ = [
    "Difference",
    "SeedSpread",
    "by_cell",
    "difference",
    "judge",
    "mean_and_interval",
    "seed_spread",
    "select",
    "stretches",
    "verdict_on",
]

STRETCHES = 40
# Column of the groups of each metric, and whether higher is better.
METRICS = {
    "brier1": ("brier", 0, 1),
    "brier2": ("brier", 1, 1),
    "brier3": ("brier", 2, 1),
    "brier4": ("brier", 3, 1),
    "energy": ("energy", 0, -1),
}
# Of Student's t, the 97.5 % quantile for 1 to 10 degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


class SeedSpread(NamedTuple):
    """Variance of a score between seeds, and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: int


ONE_SEED = SeedSpread(0.0, 0)  # nothing is known of it


@dataclass(frozen=True)
class Difference:
    """How much better one cell is than another, in a metric; positive is better.

    Attributes:
        metric: which one.
        value: of the means over seeds.
        interval: half the width of its 95 % interval.
        seeds: of the cell that has fewer.
    """

    metric: str
    value: float
    interval: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if 0 is outside the interval, else 0."""
        if not abs(self.value) > self.interval:
            return 0
        return 1 if self.value > 0 else -1

    def __str__(self) -> str:
        value, interval = (factor(self.metric) * each for each in (self.value, self.interval))
        return f"{title(self.metric)}: {value:+.3f} ± {interval:.3f}"


def by_cell(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each cell, one a seed, sorted by it."""
    cells: dict[str, list[Result]] = {}
    for result in results:
        cells.setdefault(str(sorted(result.labels.items(), key=str)), []).append(result)
    return [sorted(members, key=lambda result: result.seed) for members in cells.values()]


def select(results: Sequence[Result], labels: Mapping[str, object]) -> list[Result]:
    """The results of all seeds of the one cell with these labels, sorted by seed.

    Raises:
        UserError: no cell has them, or several have.
    """
    found = by_cell(result for result in results if result.matches(labels))
    if len(found) != 1:
        named = ", ".join(f"{name} {value}" for name, value in labels.items())
        raise UserError(f"{len(found)} cells have {named}; one is needed")
    return found[0]


def judge(claim: Claim, results: Sequence[Result]) -> tuple[Verdict, list[Difference]]:
    """The verdict on `claim`, and the differences that it rests on.

    Args:
        claim: what to judge.
        results: of the whole experiment: the spread between seeds is that of all cells.
    """
    better, worse = select(results, claim.better), select(results, claim.worse)
    text = claim.corpus
    found = [
        difference(better, worse, metric, text, seed_spread(results, metric, text))
        for metric in claim.metrics
    ]
    return verdict_on(each.sign for each in found), found


def verdict_on(differences: Iterable[int]) -> Verdict:
    """Of signs of differences: 1 supports, -1 contradicts, 0 is within its interval."""
    signs = set(differences)
    if 1 in signs and -1 not in signs:
        return Verdict.AGREES
    if -1 in signs and 1 not in signs:
        return Verdict.DISAGREES
    return Verdict.UNTOLD


def difference(
    better: Sequence[Result],
    worse: Sequence[Result],
    metric: str,
    text: str = "held-out",
    spread: SeedSpread = ONE_SEED,
) -> Difference:
    """How much better the cell `better` is than the cell `worse`, each with all its seeds."""
    name, column, sign = METRICS[metric]
    one, other = (_mean_of_seeds(results, f"{text}/{name}") for results in (better, worse))
    if len(one) != len(other) or not torch.equal(one[:, -1], other[:, -1]):
        raise UserError("two results were not scored at the same positions")
    table = torch.stack([one[:, column] - other[:, column], one[:, -1]], 1)
    between_seeds = spread.variance * (1 / len(better) + 1 / len(worse))
    value, interval = _interval(table, between_seeds, spread.freedom)
    return Difference(metric, sign * value, interval, min(len(better), len(worse)))


def mean_and_interval(
    results: Sequence[Result], metric: str, text: str, spread: SeedSpread
) -> tuple[float, float]:
    """Mean of a cell over its seeds, and half the width of its 95 % interval."""
    name, column, _ = METRICS[metric]
    table = _mean_of_seeds(results, f"{text}/{name}")[:, [column, -1]]
    return _interval(table, spread.variance / len(results), spread.freedom)


def seed_spread(results: Iterable[Result], metric: str, text: str = "held-out") -> SeedSpread:
    """Variance between seeds, pooled over the cells that have several."""
    name, column, _ = METRICS[metric]
    key, squares, freedom = f"{text}/{name}", 0.0, 0
    for cell in by_cell(result for result in results if key in result.groups):
        sums = torch.stack([stretches(result, key).sum(0) for result in cell])
        means = sums[:, column] / sums[:, -1]
        squares += (means - means.mean()).square().sum().item()
        freedom += len(cell) - 1
    return SeedSpread(squares / freedom, freedom) if freedom else ONE_SEED


def stretches(result: Result, key: str) -> Tensor:
    """Sums and count ``[STRETCHES or fewer, C + 1]`` of neighbouring groups of the text."""
    if key not in result.groups:
        raise UserError(f"{result.labels} has no {key}; it has {', '.join(result.groups)}")
    rows = torch.tensor(result.groups[key], dtype=torch.float64)
    size = max(1, math.ceil(len(rows) / STRETCHES))
    return torch.stack([part.sum(0) for part in rows.split(size)])


def _mean_of_seeds(results: Sequence[Result], key: str) -> Tensor:
    tables = [stretches(result, key) for result in results]
    if any(not torch.equal(table[:, -1], tables[0][:, -1]) for table in tables):
        raise UserError(f"seeds of {results[0].labels} were not scored at the same positions")
    return torch.stack(tables).mean(0)


def _interval(table: Tensor, between_seeds: float, freedom: int) -> tuple[float, float]:
    """Mean of ``[sum, count]`` rows, and half its 95 % interval, by Welch and Satterthwaite."""
    sums, counts = table[:, :1], table[:, 1]
    mean = corpus_means(sums, counts).item()
    if len(table) < 2:
        return mean, math.inf
    of_text = standard_errors(sums, counts).item() ** 2
    variance = of_text + between_seeds
    if variance == 0:
        return mean, 0.0
    parts = [(of_text, len(table) - 1), (between_seeds, freedom)]
    joint = variance**2 / sum(part**2 / free for part, free in parts if free)
    return mean, _student(joint) * math.sqrt(variance)


def _student(freedom: float) -> float:
    whole = max(1, int(freedom))
    return STUDENT[whole - 1] if whole <= len(STUDENT) else 1.96 + 2.6 / whole
