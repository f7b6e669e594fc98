"""Algorithm 2 as the paper writes it: a Counter and a loop over the batch."""

import math
from collections import Counter

import torch
from torch import Tensor

__all__ = ["agreeing_patch_reference"]


def agreeing_patch_reference(
    candidates: Tensor,  # [B, N, K]
    whole: Tensor,  # [B]
    fraction: Tensor,  # [B]
    vote: Tensor,  # [B]
    is_factory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, K]``, level ``[B]`` and counts ``[B, N]``; see `calm_kernels.agreeing_patch`."""
    chosen, levels, counts = [], [], []
    for row, n, a, u in zip(
        candidates.tolist(), whole.tolist(), fraction.tolist(), vote.tolist(), strict=True
    ):
        chunks = [tuple(chunk) for chunk in row]
        count = Counter(chunks)  # in the order of first occurrence
        level, weights = _cascade(list(count.values()), len(chunks), int(n), a, is_factory)
        chosen.append(list(count)[_pick(weights, u)])
        levels.append(level)
        counts.append([count[chunk] for chunk in chunks])
    batch, num_candidates, patch_size = candidates.shape

    def on_device(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=candidates.device)

    return (
        on_device(chosen, candidates.dtype).view(batch, patch_size),
        on_device(levels),
        on_device(counts).view(batch, num_candidates),
    )


def _cascade(
    counts: list[int], num_candidates: int, n: int, a: float, is_factory: bool
) -> tuple[int, list[float]]:
    """First level m = n, n-1, ..., 1 with a weight above 0, and the weights; else 0 and counts."""
    for m in range(min(n, num_candidates), 0, -1):
        weights = _weights(counts, num_candidates, m, a, is_factory)
        if sum(weights) > 0.0:
            return m, weights
    return 0, [float(c) for c in counts]


def _weights(
    counts: list[int], num_candidates: int, m: int, a: float, is_factory: bool
) -> list[float]:
    """Weights of all chunks, divided by that of a chunk which occurs as often as the commonest."""
    top = max(counts)
    if top < m:
        return [0.0] * len(counts)
    if a > 0.0 and not is_factory:
        return [math.exp(_log_ratio(c, m + a) - _log_ratio(top, m + a)) if c >= m else 0.0
                for c in counts]  # fmt: skip
    weights = [math.comb(c, m) / math.comb(top, m) for c in counts]
    if a == 0.0:
        return weights
    return [
        weight * _acceptance(c - m, num_candidates - m, a) if c >= m else 0.0
        for weight, c in zip(weights, counts, strict=True)
    ]


def _log_ratio(c: int, s: float) -> float:
    """Logarithm of Γ(c + 1) / Γ(c + 1 - s)."""
    return math.lgamma(c + 1) - math.lgamma(c + 1 - s)


def _acceptance(hits: int, others: int, a: float) -> float:
    """Chance that the factory accepts within `others` draws in random order, `hits` of which match.

    Σ_j P(the first match is draw j + 1) · Π_{i<j} (1 - a / (i + 1)): no rejection at any of the j
    misses before it.
    """
    if hits == 0:
        return 0.0
    total, survival = 0.0, 1.0
    for j in range(others - hits + 1):
        total += survival * hits / (others - j)
        survival *= (others - hits - j) / (others - j) * (1.0 - a / (j + 1))
    return total


def _pick(weights: list[float], u: float) -> int:
    """First index whose cumulative weight exceeds u times the sum."""
    threshold = u * sum(weights)
    cumulative = 0.0
    for index, weight in enumerate(weights):
        cumulative += weight
        if cumulative > threshold:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0.0)
