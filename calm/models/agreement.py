"""Brier-n from draws: how often draws agree with the target, and with each other.

A Brier score rewards probability on the outcome and penalises concentration:
Brier(P, y) = 2 P(y) - sum_x P(x)^2. Both parts are probabilities of agreement, so that draws alone
estimate them without bias: by the share of draws that equal y, and by the share of pairs of draws
that equal each other (CALM, equations 12-14; two draws give its estimator). Brier-n takes the first
n tokens of a chunk as one outcome.
"""

import torch
from torch import Tensor

__all__ = ["MAX_ORDER", "brier_terms", "prefix_collisions", "prefix_matches"]

MAX_ORDER = 4  # BrierLM combines Brier-1 to Brier-4


def prefix_matches(draws: Tensor, target: Tensor) -> Tensor:
    """Whether the first n tokens of a draw are those of the target, for n = 1 .. min(K, 4).

    Args:
        draws: token ids ``[..., K]``.
        target: token ids that broadcast against `draws`; a negative id (an ignored label) matches
            nothing.

    Returns: 0 or 1 in float32, ``[..., min(K, 4)]``.
    """
    same = draws[..., :MAX_ORDER] == target[..., :MAX_ORDER]
    return same.to(torch.float32).cumprod(-1)


def prefix_collisions(draws: Tensor) -> Tensor:
    """Share of pairs of draws whose first n tokens agree, for n = 1 .. min(K, 4).

    collisions = sum_x c_x (c_x - 1) / (N (N - 1)), with c_x the number of draws that begin with x

    Args:
        draws: token ids of N >= 2 independent draws, ``[N, ..., K]``.

    Returns: float32 ``[..., min(K, 4)]``, an unbiased estimate of sum_x P(x)^2.
    Raises:
        ValueError: fewer than two draws.
    Cost: N - 1 comparisons of at most N draws; no ``[N, N, ...]`` array is formed.
    """
    count = draws.shape[0]
    if count < 2:
        raise ValueError(f"draws must hold at least 2 draws to compare, got {count}")
    # Draws that lie `lag` apart, for every lag: each unordered pair once.
    agreeing = [prefix_matches(draws[lag:], draws[:-lag]).sum(0) for lag in range(1, count)]
    return torch.stack(agreeing).sum(0) / (count * (count - 1) / 2)


def brier_terms(draws: Tensor, target: Tensor) -> Tensor:
    """Brier-1 to Brier-4 of a chunk from N draws of it (pair-count U-statistic); higher is better.

    Brier-n = 2 c_y / N - sum_x c_x (c_x - 1) / (N (N - 1))

    Unbiased: the average of the published two-draw estimator over all pairs of draws.

    Args:
        draws: token ids of N >= 2 independent draws, ``[N, ..., K]`` with K >= 4.
        target: the true chunk, ``[..., K]``.

    Returns: float32 ``[..., 4]``, in [-1, 1].
    Raises:
        ValueError: fewer than two draws, or chunks of fewer than four tokens, whose n-grams need a
            rollout (`calm.evaluation.brier_scores`).
    """
    if draws.shape[-1] < MAX_ORDER:
        raise ValueError(
            f"draws must be chunks of at least {MAX_ORDER} tokens, got {draws.shape[-1]}; "
            "calm.evaluation.brier_scores rolls shorter chunks out"
        )
    return 2.0 * prefix_matches(draws, target).mean(0) - prefix_collisions(draws)
