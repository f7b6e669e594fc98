"""The torch backend: equal chunks found by sorting, all rows at once.

Two identities make the weights elementwise. With r = c - m hits among R = N - m other draws, the
factory's sum is a Chu-Vandermonde series,

    h = Γ(r+1) Γ(R+1-a) / (Γ(R+1) Γ(r+1-a))    for r >= 1, and 0 for r = 0,

so that C(c, m) h = Γ(c+1) / Γ(c+1-s) up to a constant: the factory form is the gamma form without
the chunks that occur exactly m times. From one count to the next it grows by the factor
1 / (1 - s / (c+1)): one running product, downwards from the highest count, gives the weights of
all. And the cascade stops at m = min(n, max count), one lower (if a > 0) for the factory.
"""

import torch
from torch import Tensor

__all__ = ["agreeing_patch_eager", "choose", "count_occurrences", "vote_weights"]


def agreeing_patch_eager(
    candidates: Tensor,  # [B, N, K]
    whole: Tensor,  # [B]
    fraction: Tensor,  # [B]
    vote: Tensor,  # [B]
    is_factory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, K]``, level ``[B]`` and counts ``[B, N]``; see `calm_kernels.agreeing_patch`."""
    counts, is_first = count_occurrences(candidates)
    index, level = choose(counts, is_first, whole, fraction, vote, is_factory)
    return candidates[torch.arange(len(index), device=index.device), index], level, counts


def choose(
    counts: Tensor,  # [B, N]
    is_first: Tensor,  # [B, N]
    whole: Tensor,  # [B]
    fraction: Tensor,  # [B]
    vote: Tensor,  # [B]
    is_factory: bool,
) -> tuple[Tensor, Tensor]:
    """Index of the choice and level, ``[B]`` each, among chunks that occur `counts` times."""
    weights, level = vote_weights(counts, whole, fraction, is_factory)
    cumulative = (weights * is_first).cumsum(dim=1)
    index = (cumulative > vote[:, None] * cumulative[:, -1:]).to(torch.uint8).argmax(dim=1)
    return index, level.to(torch.int64)


def vote_weights(
    counts: Tensor,  # [B, N]
    whole: Tensor,  # [B]
    fraction: Tensor,  # [B]
    is_factory: bool,
) -> tuple[Tensor, Tensor]:
    """Weights ``[B, N]`` relative to that of the highest count, at level 0 the count; level."""
    highest = counts.amax(dim=1).to(torch.float64)
    misses = ((fraction > 0.0) & is_factory).to(torch.float64)  # hits needed beyond m
    level = torch.minimum(whole, highest - misses)
    power = torch.where(level == 0.0, 1.0, level + fraction)[:, None]
    occurrences = torch.arange(2, counts.shape[1] + 2, dtype=torch.float64, device=counts.device)
    factors = torch.where(occurrences <= highest[:, None], 1.0 - power / occurrences, 1.0)
    table = factors.flip(1).cumprod(dim=1).flip(1)  # of count 1, 2, ..., N
    least = torch.where(level == 0.0, 0.0, level + misses)[:, None]
    return torch.where(counts >= least, table.gather(1, counts - 1), 0.0), level


def count_occurrences(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """How often each candidate's chunk occurs, int64 ``[B, N]``, and whether it is the first one.

    Stable sorts by the last token, then the one before, and so on: equal chunks end up side by
    side, each run in its original order.
    """
    order = candidates[..., -1].argsort(dim=1, stable=True)  # [B, N]
    for token in range(candidates.shape[2] - 2, -1, -1):
        step = candidates[..., token].gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, step)
    chunks = candidates.gather(1, order[..., None].expand_as(candidates))
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[:, 1:] = (chunks[:, 1:] != chunks[:, :-1]).any(dim=2)
    run = starts.cumsum(dim=1) - 1
    lengths = torch.zeros_like(order).scatter_add_(1, run, torch.ones_like(order))
    counts = torch.empty_like(order).scatter_(1, order, lengths.gather(1, run))
    return counts, torch.empty_like(starts).scatter_(1, order, starts)
