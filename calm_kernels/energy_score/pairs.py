"""Powers of distances between two sets of points, with their gradients, never as one ``[N, M, R, L]`` array.

Distances come from differences, not from |x|² + |y|² - 2xy: at the first training step all samples may
coincide, and a difference of large squares would return rounding noise there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WORKING_SET", "DistanceTerm", "distance_term"]

# Elements of the largest intermediate: about what a core's own cache holds.
WORKING_SET = 1 << 18


class DistanceTerm(NamedTuple):
    """A sum over pairs of points and its gradients; None where not asked for."""

    total: Tensor  # [R]
    dx: Tensor | None  # [R, N, L]
    dy: Tensor | None  # [R, M, L]


def distance_term(
    x: Tensor, y: Tensor, exponent: float, scale: Tensor, *, need_dx: bool, need_dy: bool
) -> DistanceTerm:
    """scale · Σ_{n,m} |x_n - y_m|^α of each patch.

    The gradient of |v|^α is α |v|^(α-2) v, and 0 where v = 0.

    Args:
        x: ``[R, N, L]``.
        y: ``[R, M, L]``.
        scale: ``[R]``, multiplies the sum and its gradients.
    """
    num_targets = y.shape[1]
    total = torch.zeros_like(scale)
    dx = torch.zeros_like(x) if need_dx else None
    dy = torch.empty_like(y) if need_dy else None
    step = max(1, WORKING_SET // max(1, x.numel()))
    for start in range(0, num_targets, step):
        block = slice(start, min(start + step, num_targets))
        difference = x[:, :, None] - y[:, None, block]  # [R, N, m, L]
        length = torch.linalg.vector_norm(difference, dim=-1)  # [R, N, m]
        powered, slope = power(length, exponent, need_slope=need_dx or need_dy)
        total += powered.sum(dim=(1, 2))
        if slope is None:
            continue
        slope *= scale[:, None, None]
        if dx is not None:
            dx += torch.matmul(slope[:, :, None], difference)[:, :, 0]
        if dy is not None:
            dy[:, block] = -torch.einsum("rnm,rnml->rml", slope, difference)
    return DistanceTerm(total * scale, dx, dy)


def power(length: Tensor, exponent: float, *, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """length^α and α · length^(α-2).

    Lengths whose square underflows count as zero: their slope is 0, so that no exponent overflows.
    """
    powered = length if exponent == 1.0 else length.pow(exponent)
    if not need_slope:
        return powered, None
    smallest = torch.finfo(length.dtype).tiny ** 0.5
    slope = length.reciprocal() if exponent == 1.0 else length.pow(exponent - 2).mul_(exponent)
    return powered, slope.masked_fill_(length <= smallest, 0.0)
