"""Rows, weights and labels for the cross-entropy of a linear layer, and how it is run."""

import torch
from helpers import leaf

from calm_kernels import linear_cross_entropy

__all__ = ["IGNORED", "make_case", "run", "shape_id"]

IGNORED = -100


def shape_id(shape):
    return "x".join(map(str, shape))


def make_case(shape, generator, dtype=torch.float64):
    """Hidden states, weight and labels, a third of which are ignored if there are many."""
    *lead, width, vocabulary = shape
    hidden = torch.randn(*lead, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocabulary, tuple(lead), generator=generator)
    if labels.numel() > 2:
        labels.view(-1)[::3] = IGNORED
    return hidden, weight, labels


def run(case, dtype, backend, factor=1.0, **options):
    """Loss and its gradients, times `factor`."""
    hidden, weight, labels = case
    hidden, weight = leaf(hidden, dtype), leaf(weight, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(factor * loss, (hidden, weight))]
