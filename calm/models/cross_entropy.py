"""Cross-entropy of the models' output layers, as sums and counts."""

import torch
from torch import Tensor

from calm.labels import IGNORE_INDEX, Term
from calm_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["cross_entropy"]


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, by_sequence: bool = False
) -> Term:
    """Cross-entropy of ``hidden @ weight.T``, summed over the labels that count.

    Args:
        hidden: ``[B, ..., H]``; differentiable.
        weight: ``[V, H]``; differentiable.
        labels: ``[B, ...]``, -100 where they do not count.
        by_sequence: one call for each sequence, and its own sum.

    Returns: sums ``[B]`` if `by_sequence`, else ``[1]``, 0 with zero gradients where nothing
        counts; counts ``[B]``.
    """
    counts = (labels != IGNORE_INDEX).flatten(1).sum(1)
    parts = zip(hidden, labels, strict=True) if by_sequence else [(hidden, labels)]
    means = torch.stack([linear_cross_entropy(part, weight, wanted) for part, wanted in parts])
    divisors = counts if by_sequence else counts.sum()[None]
    # The mean over no label is NaN.
    return Term(torch.where(divisors > 0, means * divisors, 0.0), counts)
