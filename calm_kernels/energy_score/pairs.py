"""Powers of distances between points, with their gradients; no ``[N, M, R, L]`` array.

Distances come from differences, not from |x|² + |y|² - 2xy: at the first training step all samples
may coincide, and a difference of large squares would return rounding noise there. The gradient of
|v|^α is α |v|^(α-2) v, and 0 where v = 0.
"""

import torch
from torch import Tensor

from calm_kernels.energy_score.chunks import WORKING_SET, in_chunks

__all__ = ["between", "within"]

Terms = tuple[Tensor, Tensor | None, Tensor | None]


def within(
    x: Tensor, exponent: float, scale: Tensor, *, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum scale · Σ_{i<j} |x_i - x_j|^α of each patch and its gradient ``[R, N, L]``.

    Args:
        x: ``[R, N, L]``.
        exponent: α.
        scale: ``[R]``, multiplies the sum and the gradient.
        need_dx: whether to compute the gradient.
    """
    num_samples = x.shape[1]
    total = torch.zeros_like(scale)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    for lag in range(1, num_samples):  # pairs (i, i + lag)
        difference = x[:, lag:] - x[:, :-lag]  # [R, N - lag, L]
        powered, slope = _power(difference, exponent, need_slope=need_dx)
        total += powered.sum(1)
        if dx is not None and slope is not None:
            pull = difference.mul_((slope * scale[:, None])[..., None])
            dx[:, lag:] += pull
            dx[:, :-lag] -= pull
    return total * scale, dx


def between(
    x: Tensor, y: Tensor, exponent: float, scale: Tensor, *, need_dx: bool, need_dy: bool
) -> Terms:
    """The sum scale · Σ_{n,m} |x_n - y_m|^α of each patch and its gradients in x and y.

    Args:
        x: ``[R, N, L]``.
        y: ``[R, M, L]``.
        exponent: α.
        scale: ``[R]``, multiplies the sum and the gradients.
        need_dx: whether to compute the gradient of x.
        need_dy: whether to compute the gradient of y.
    """
    num_samples, num_targets, width = x.shape[1], y.shape[1], x.shape[2]
    block = max(1, min(num_targets, WORKING_SET // max(1, num_samples * width)))
    scratch = x.new_empty(0)

    def compute(rows: slice) -> Terms:
        nonlocal scratch
        total = torch.zeros_like(scale[rows])
        dx = torch.zeros_like(x[rows]) if need_dx else None
        dy = torch.empty_like(y[rows]) if need_dy else None
        for start in range(0, num_targets, block):
            part = slice(start, min(start + block, num_targets))
            near, far = x[rows, :, None], y[rows, None, part]
            shape = torch.broadcast_shapes(near.shape, far.shape)
            if scratch.numel() < shape.numel():
                scratch = x.new_empty(shape.numel())
            difference = torch.sub(near, far, out=scratch[: shape.numel()].view(shape))
            powered, slope = _power(difference, exponent, need_slope=need_dx or need_dy)
            total += powered.sum(dim=(1, 2))
            if slope is None:
                continue
            slope *= scale[rows, None, None]
            if dx is not None:
                dx += torch.matmul(slope[:, :, None], difference)[:, :, 0]
            if dy is not None:
                dy[:, part] = -difference.mul_(slope[..., None]).sum(1)
        return total * scale[rows], dx, dy

    return in_chunks(compute, x.shape[0], num_samples * block * width)  # type: ignore[return-value]


def _power(
    difference: Tensor, exponent: float, *, need_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """|v|^α and α · |v|^(α-2) over the last axis.

    Lengths whose square underflows count as zero: their slope is 0, and no exponent overflows.
    """
    length = torch.linalg.vector_norm(difference, dim=-1)
    powered = length if exponent == 1.0 else length.pow(exponent)
    if not need_slope:
        return powered, None
    smallest = torch.finfo(length.dtype).tiny ** 0.5
    slope = length.reciprocal() if exponent == 1.0 else length.pow(exponent - 2).mul_(exponent)
    return powered, slope.masked_fill_(length <= smallest, 0.0)
