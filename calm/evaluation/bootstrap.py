"""From sums per block to BrierLM, its standard errors and its bootstrap interval.

Brier-n is averaged over the whole corpus first and the geometric mean is taken once: a mean of
per-block BrierLM would be biased, and undefined where a block's Brier-n is not positive.
"""

import torch
from torch import Tensor

__all__ = [
    "ORDERS",
    "bootstrap_interval",
    "brier_lm",
    "brier_lm_error",
    "corpus_means",
    "resampled_sums",
    "standard_errors",
]

ORDERS = ("brier1", "brier2", "brier3", "brier4")
RESAMPLE_CHUNK = 256  # bootstrap resamples held at a time


def brier_lm(brier: Tensor) -> Tensor:
    """BrierLM = 100 * (Brier-1 * Brier-2 * Brier-3 * Brier-4)^(1/4), for ``[..., 4]``.

    0 where any Brier-n is not positive. (Before training all four are negative; the published code
    multiplies them to a positive number and reports about 98.) Source: paper, equation 15.
    """
    mean = brier.clamp(min=0).log().mean(-1).exp()
    return torch.where((brier > 0).all(-1), 100.0 * mean, 0.0)


def corpus_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Brier-1 to Brier-4 ``[4]`` over all positions; sums ``[blocks, 4]``, counts ``[blocks]``."""
    return sums.sum(0) / counts.sum()


def standard_errors(sums: Tensor, counts: Tensor) -> Tensor:
    """Standard errors of `corpus_means`, ``[4]``: those of a ratio of sums over blocks.

    Positions of one block share their text, so the block is the unit. With residuals
    e_b = sum_b - count_b * mean, SE^2 = n / (n - 1) * sum_b e_b^2 / (sum_b count_b)^2.
    NaN for fewer than two blocks.
    """
    blocks = len(counts)
    if blocks < 2:
        return torch.full_like(sums[0], torch.nan)
    residuals = sums - counts[:, None] * corpus_means(sums, counts)
    return (residuals.square().sum(0) * blocks / (blocks - 1)).sqrt() / counts.sum()


def brier_lm_error(sums: Tensor, counts: Tensor) -> Tensor:
    """Standard error of BrierLM of the whole corpus, ``[]``, to first order in those of Brier-n.

    A small change of Brier-n changes BrierLM by BrierLM / (4 Brier-n) of it; `standard_errors` of
    the sums weighted so have the covariance of the four in them. NaN for fewer than two blocks, and
    where BrierLM is 0.
    """
    means = corpus_means(sums, counts)
    weighted = (sums * (brier_lm(means) / (4 * means))).sum(-1, keepdim=True)
    error = standard_errors(weighted, counts)[0]
    return torch.where((means > 0).all(), error, torch.nan)


def bootstrap_interval(
    sums: Tensor,
    counts: Tensor,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Tensor:
    """Percentile intervals of Brier-1 to Brier-4 and BrierLM, from blocks drawn with replacement.

    Args:
        sums: ``[blocks, 4]``, float64.
        counts: positions of each block, ``[blocks]``, each > 0.
        resamples: number of resampled corpora.
        confidence: share of them inside the interval.
        seed: of the draws of blocks.

    Returns: ``[2, 5]``: lower and upper end; columns Brier-1 .. Brier-4 (fractions) and BrierLM
        (0 to 100). NaN for fewer than two blocks.
    Cost: resamples * blocks draws, on the CPU.
    """
    blocks = len(counts)
    if blocks < 2:
        return torch.full((2, 5), torch.nan, dtype=sums.dtype)
    drawn = resampled_sums(
        torch.cat([sums, counts[:, None]], dim=1).cpu(), resamples=resamples, seed=seed
    )
    brier = drawn[:, :4] / drawn[:, 4:]
    values = torch.cat([brier, brier_lm(brier)[:, None]], dim=1)
    tail = (1.0 - confidence) / 2.0
    return values.quantile(torch.tensor([tail, 1.0 - tail], dtype=values.dtype), dim=0)


def resampled_sums(table: Tensor, *, resamples: int, seed: int) -> Tensor:
    """Column sums ``[resamples, C]`` of as many rows of `table` ``[n, C]``, drawn with replacement.

    All columns of a resample share its rows: differences of columns are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for begin in range(0, resamples, RESAMPLE_CHUNK):
        size = (min(RESAMPLE_CHUNK, resamples - begin), len(table))
        sums.append(table[torch.randint(len(table), size, generator=generator)].sum(1))
    return torch.cat(sums)
