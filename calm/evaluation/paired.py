"""Two models on one text: differences at the same positions, with errors that the text cancels.

Scores of two models rise and fall together with the text. Resampling the same groups of positions
for both measures their difference far more sharply than two intervals do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import UserError
from calm.evaluation.bootstrap import ORDERS, brier_lm, resampled_sums
from calm.evaluation.scores import TextScores

__all__ = [
    "METRICS",
    "PairedDifference",
    "common_positions",
    "paired_difference",
    "paired_means",
    "paired_steps",
]

METRICS = (*ORDERS, "brier_lm")
# Entries of the protocol in which evaluations that are compared must agree.
SHARED = ("tokenizer_hash", "block_size", "skip_repeats", "dtype")


@dataclass(frozen=True)
class PairedDifference:
    """Scores of model a minus scores of model b, by name.

    Attributes:
        difference: of each score; Brier-n as fractions, BrierLM on its scale of 0 to 100.
        interval: bootstrap interval of each; NaN with fewer than two groups.
        standard_error: standard deviation of the resampled differences; NaN likewise.
        share_beyond_zero: share of the resampled differences that are 0 or have the other sign;
            small where the sign is certain. 1 where the difference is 0.
    """

    difference: dict[str, float]
    interval: dict[str, tuple[float, float]]
    standard_error: dict[str, float]
    share_beyond_zero: dict[str, float]

    def is_tied(self, metric: str) -> bool:
        """Whether the interval of `metric` holds 0, or there is none."""
        low, high = self.interval[metric]
        return not (low > 0 or high < 0)


def common_positions(scores: Sequence[TextScores]) -> list[TextScores]:
    """The scores at the positions that all models share, in the same order.

    Texts may end at different places, as blocks with start chunks hold less text: the shorter one
    must then be a beginning of the longer one.

    Raises:
        UserError: the texts or what `SHARED` names differ, or no position is shared.
    """
    first = scores[0]
    for other in scores[1:]:
        _check_comparable(first, other)
    shared = first.offsets
    for other in scores[1:]:
        shared = shared[torch.isin(shared, other.offsets, assume_unique=True)]
    if not len(shared):
        raise UserError(
            "the models share no position: their n-grams start at different places of the text "
            "(start chunks, K and block size decide where); compare fewer models, or on more text"
        )
    common = [one.select(torch.isin(one.offsets, shared, assume_unique=True)) for one in scores]
    for one in common:
        one.protocol["positions_are"] += f"; those that {len(scores)} models share"
    return common


def paired_difference(
    sums_a: Tensor,
    counts: Tensor,
    sums_b: Tensor,
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Scores of model a minus those of model b, resampling the same groups for both.

    Args:
        sums_a: sums of Brier-1 to Brier-4 of model a in each group of positions, ``[G, 4]``, as
            `TextScores.grouped` of `common_positions` gives them.
        counts: positions of each group, ``[G]``, each > 0.
        sums_b: of model b, at the same positions.
        seed: of the resampled groups.
        resamples: how many resampled texts.
        confidence: share of them inside the interval.
    """
    sides = [(1, sums_a), (-1, sums_b)]
    return _compared(sides, counts, METRICS, _brier_values, seed, resamples, confidence)


def paired_steps(
    sums_a: Tensor,
    counts: Tensor,
    sums_b: Tensor,
    sums_c: Tensor,
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDifference:
    """By how much more scores fall from model a to b than from b to c: (a - b) - (b - c).

    Arguments as `paired_difference`.
    """
    sides = [(1, sums_a), (-2, sums_b), (1, sums_c)]
    return _compared(sides, counts, METRICS, _brier_values, seed, resamples, confidence)


def paired_means(
    sums_a: Tensor,
    counts: Tensor,
    sums_b: Tensor,
    names: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDifference:
    """As `paired_difference`, of means over positions: those of `calm.evaluation.measures`.

    Args:
        sums_a: ``[G, C]``.
        counts: ``[G]``.
        sums_b: ``[G, C]``.
        names: of the C columns.
        seed: likewise, and what follows.
        resamples: likewise.
        confidence: likewise.
    """
    return _compared(
        [(1, sums_a), (-1, sums_b)], counts, names, _means, seed, resamples, confidence
    )


def _means(means: Tensor) -> Tensor:
    return means


def _brier_values(brier: Tensor) -> Tensor:
    """Brier-1 to Brier-4 ``[..., 4]`` and BrierLM, ``[..., 5]``."""
    return torch.cat([brier, brier_lm(brier)[..., None]], dim=-1)


def _compared(
    sides: Sequence[tuple[int, Tensor]],
    counts: Tensor,
    names: Sequence[str],
    values_of: Callable[[Tensor], Tensor],
    seed: int,
    resamples: int,
    confidence: float,
) -> PairedDifference:
    """Sum of `values_of` the means ``[..., C]`` of each model, times the factor beside its sums."""
    shapes = {sums.shape for _, sums in sides}
    if len(shapes) > 1 or len(sides[0][1]) != len(counts):
        groups = ", ".join(str(len(sums)) for _, sums in sides)
        raise UserError(
            f"sums and counts must have the same groups, got {groups} and {len(counts)}; take them "
            "of common_positions"
        )
    columns = sides[0][1].shape[1]
    table = torch.cat([*(sums for _, sums in sides), counts[:, None]], dim=1).double()

    def differences(sums: Tensor) -> Tensor:
        means = (sums[..., :-1] / sums[..., -1:]).split(columns, dim=-1)
        first, *others = (
            factor * values_of(mean) for (factor, _), mean in zip(sides, means, strict=True)
        )
        return sum(others, first)

    values = differences(table.sum(0))
    drawn = differences(resampled_sums(table, resamples=resamples, seed=seed))
    beyond = (drawn * values.sign() <= 0).double().mean(0)
    if len(counts) < 2:
        drawn, beyond = drawn * torch.nan, beyond * torch.nan
    tail = (1.0 - confidence) / 2.0
    low, high = drawn.quantile(torch.tensor([tail, 1.0 - tail], dtype=drawn.dtype), dim=0).tolist()
    ends = zip(low, high, strict=True)
    return PairedDifference(
        difference=dict(zip(names, values.tolist(), strict=True)),
        interval=dict(zip(names, ends, strict=True)),
        standard_error=dict(zip(names, drawn.std(0).tolist(), strict=True)),
        share_beyond_zero=dict(zip(names, beyond.tolist(), strict=True)),
    )


def _check_comparable(one: TextScores, other: TextScores) -> None:
    """Raise if `one` and `other` do not score one text in one way; says what differs."""
    names = [str(scores.protocol.get("model", "one model")) for scores in (one, other)]
    for key in SHARED:
        values = [scores.protocol.get(key) for scores in (one, other)]
        if None not in values and values[0] != values[1]:
            raise UserError(
                f"{names[0]} and {names[1]} cannot be compared: {key} is {values[0]} and "
                f"{values[1]}; evaluate both alike"
            )
    length = min(len(one.text), len(other.text))
    differs = (one.text[:length] != other.text[:length]).nonzero()
    if len(differs):
        raise UserError(
            f"{names[0]} and {names[1]} were evaluated on different texts: their tokens differ "
            f"from token {int(differs[0])} on; evaluate both on one text"
        )
