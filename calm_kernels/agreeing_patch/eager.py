"""The torch backend: equal patches found by sorting, all rows at once.

Two identities make the weights elementwise. With r = c - m hits among R = N - m other draws, the
factory's sum is a Chu-Vandermonde series,

    h = Γ(r+1) Γ(R+1-a) / (Γ(R+1) Γ(r+1-a))    for r >= 1, and 0 for r = 0,

so that C(c, m) h = Γ(c+1) / Γ(c+1-s) up to a constant: the factory form is the gamma form without
the patches that occur exactly m times. And the cascade stops at m = min(n, max count), one lower
(if a > 0) for the factory.
"""

import torch
from torch import Tensor

__all__ = ["agreeing_patch_eager"]


def agreeing_patch_eager(
    candidates: Tensor,  # [B, N, K]
    whole: Tensor,  # [B]
    fraction: Tensor,  # [B]
    vote: Tensor,  # [B]
    is_factory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the choice ``[B]``, level ``[B]`` and counts ``[B, N]``; see the public function."""
    counts, is_first = _occurrences(candidates)
    highest = counts.amax(dim=1).to(torch.float64)
    misses = ((fraction > 0.0) & is_factory).to(torch.float64)  # hits needed beyond m
    level = torch.minimum(whole, highest - misses)
    weights = _weights(counts.to(torch.float64), level, fraction, misses)
    cumulative = (weights * is_first).cumsum(dim=1)
    index = (cumulative > vote[:, None] * cumulative[:, -1:]).to(torch.uint8).argmax(dim=1)
    return index, level.to(torch.int64), counts


def _weights(counts: Tensor, level: Tensor, fraction: Tensor, misses: Tensor) -> Tensor:
    """Weights ``[B, N]`` relative to the largest; at level 0 the count, which is Γ(c+1) / Γ(c)."""
    power = torch.where(level == 0.0, 1.0, level + fraction)[:, None]
    is_possible = counts >= torch.where(level == 0.0, 0.0, level + misses)[:, None]
    log_weight = torch.lgamma(counts + 1.0) - torch.lgamma((counts + 1.0 - power).clamp(min=1e-6))
    log_weight = torch.where(is_possible, log_weight, -torch.inf)
    return torch.exp(log_weight - log_weight.amax(dim=1, keepdim=True))


def _occurrences(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """How often each candidate's patch occurs, int64 ``[B, N]``, and whether it is the first one.

    Stable sorts by the last token, then the one before, and so on: equal patches end up side by
    side, each run in its original order.
    """
    order = candidates[..., -1].argsort(dim=1, stable=True)  # [B, N]
    for token in range(candidates.shape[2] - 2, -1, -1):
        step = candidates[..., token].gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, step)
    patches = candidates.gather(1, order[..., None].expand_as(candidates))
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[:, 1:] = (patches[:, 1:] != patches[:, :-1]).any(dim=2)
    run = starts.cumsum(dim=1) - 1
    lengths = torch.zeros_like(order).scatter_add_(1, run, torch.ones_like(order))
    counts = torch.empty_like(order).scatter_(1, order, lengths.gather(1, run))
    return counts, torch.empty_like(starts).scatter_(1, order, starts)
