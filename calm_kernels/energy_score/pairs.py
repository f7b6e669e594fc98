"""Powers of distances between points, with their gradients; no ``[N, M, R, L]`` array.

Distances come from differences: at the first training step all samples may coincide, and then the
large squares in |x|² + |y|² - 2xy would cancel to rounding noise. Samples and targets of many
dimensions are rarely near. For those a CPU computes xy as a matmul of centred points, keeps the
pairs that are far apart, and takes differences for the others. The gradient of |v|^α is α |v|^(α-2)
v, and 0 where v = 0. Sums are float64: the terms of a score are large and nearly cancel.
"""

import torch
from torch import Tensor

from calm_kernels.energy_score.row_blocks import in_row_blocks, working_set

__all__ = ["between", "within"]

# The sum, and its gradients in x, in y and in the weights.
Terms = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
# Matmuls from this many dimensions on; with fewer, too many pairs are near.
MIN_MATMUL_WIDTH = 64
# |v|² of at least this share of |x|² + |y|² has lost at most four bits to cancellation.
MIN_SHARE = 1 / 16
# Beyond this share of near pairs, differences are taken for all pairs.
MAX_NEAR = 1 / 16


def within(
    x: Tensor, exponent: float, scale: Tensor, *, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum scale · Σ_{i<j} |x_i - x_j|^α of each position and its gradient ``[R, N, L]``.

    Args:
        x: ``[R, N, L]``.
        exponent: α.
        scale: ``[R]``, multiplies the sum and the gradient.
        need_dx: whether to compute the gradient.
    """
    num_samples = x.shape[1]
    total = torch.zeros_like(scale, dtype=torch.float64)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    for lag in range(1, num_samples):  # pairs (i, i + lag)
        difference = x[:, lag:] - x[:, :-lag]  # [R, N - lag, L]
        powered, slope = _power(difference, exponent, need_slope=need_dx)
        total += powered.sum(1, dtype=torch.float64)
        if dx is not None and slope is not None:
            pull = difference.mul_((slope * scale[:, None])[..., None])
            dx[:, lag:] += pull
            dx[:, :-lag] -= pull
    return total * scale, dx


def between(
    x: Tensor,
    y: Tensor,
    exponent: float,
    scale: Tensor,
    weights: Tensor | None = None,
    *,
    need_dx: bool,
    need_dy: bool,
) -> Terms:
    """The sum scale · Σ_{n,m} w_m |x_n - y_m|^α of each position, and its gradients.

    Args:
        x: ``[R, N, L]``.
        y: ``[R, M, L]``.
        exponent: α.
        scale: ``[R]``, multiplies the sum and the gradients.
        weights: w, ``[R, M]``, 1 if not given. Given, their gradient comes with the sum.
        need_dx: whether to compute the gradient of x.
        need_dy: whether to compute the gradient of y.
    """
    num_samples, num_targets, width = x.shape[1], y.shape[1], x.shape[2]
    # Reading which pairs are near would synchronise a GPU.
    if x.device.type != "cpu" or width < MIN_MATMUL_WIDTH:
        return _by_differences(x, y, exponent, scale, weights, need_dx, need_dy)

    def compute(rows: slice) -> Terms:
        of_rows = None if weights is None else weights[rows]
        part = (x[rows], y[rows], exponent, scale[rows], of_rows, need_dx, need_dy)
        return _by_matmul(*part) or _by_differences(*part)

    elements = (num_samples + num_targets) * max(num_samples, width)
    return in_row_blocks(compute, x.shape[0], elements, x.device)


def _by_differences(
    x: Tensor,
    y: Tensor,
    exponent: float,
    scale: Tensor,
    weights: Tensor | None,
    need_dx: bool,
    need_dy: bool,
) -> Terms:
    """`between` by differences ``[r, N, m, L]``, as many at a time as a block holds."""
    num_samples, num_targets, width = x.shape[1], y.shape[1], x.shape[2]
    block = max(1, min(num_targets, working_set(x.device) // max(1, num_samples * width)))
    factors = _factors(scale, weights, num_targets)
    scratch = x.new_empty(0)

    def compute(rows: slice) -> Terms:
        nonlocal scratch
        sums = torch.zeros_like((scale if weights is None else weights)[rows], dtype=torch.float64)
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
            if weights is None:
                sums += powered.sum(dim=(1, 2), dtype=torch.float64)
            else:
                sums[:, part] = powered.sum(1, dtype=torch.float64)
            if slope is None:
                continue
            slope *= factors[rows, None, part]
            if dx is not None:
                dx += torch.matmul(slope[:, :, None], difference)[:, :, 0]
            if dy is not None:
                dy[:, part] = -difference.mul_(slope[..., None]).sum(1)
        total, dweights = _weighted(sums, scale[rows], None if weights is None else weights[rows])
        return total, dx, dy, dweights

    return in_row_blocks(compute, x.shape[0], num_samples * block * width, x.device)


def _by_matmul(
    x: Tensor,
    y: Tensor,
    exponent: float,
    scale: Tensor,
    weights: Tensor | None,
    need_dx: bool,
    need_dy: bool,
) -> Terms | None:
    """As `between`, by a matmul of points centred on the targets' mean; None if many are near."""
    center = _center(y, weights)
    near_x, near_y = x, y  # near points differ in digits that centring rounds away
    x, y = x - center, y - center
    squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]  # [r, N, M]
    least = squares * MIN_SHARE
    square = torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2)
    # Written so that what overflowed, underflowed or is no number counts as near.
    is_far = (square >= least) & (least > torch.finfo(x.dtype).tiny / torch.finfo(x.dtype).eps)
    # Where both squares are 0, as in a masked position, so is the distance.
    near = (~is_far & (squares != 0)).nonzero(as_tuple=True)
    if near[0].numel() > MAX_NEAR * square.numel():
        return None
    need_slope = need_dx or need_dy
    length = square.masked_fill_(~is_far, 1.0).sqrt_()
    powered, slope = _powers(length, exponent, need_slope=need_slope)
    powered = powered.masked_fill(~is_far, 0.0)
    sums = powered.sum((1, 2) if weights is None else 1, dtype=torch.float64)
    row, n, m = near
    difference = near_x[row, n] - near_y[row, m]
    near_powered, near_slope = _power(difference, exponent, need_slope=need_slope)
    place = (row,) if weights is None else (row, m)
    sums.index_put_(place, near_powered.double(), accumulate=True)
    total, dweights = _weighted(sums, scale, weights)
    if slope is None or near_slope is None:
        return total, None, None, dweights
    factors = _factors(scale, weights, y.shape[1])
    slope = slope.masked_fill_(~is_far, 0.0).mul_(factors[:, None])
    pull = difference * (near_slope * factors[row, m])[:, None]
    dx = dy = None
    if need_dx:
        dx = torch.baddbmm(x * slope.sum(2, keepdim=True), slope, y, alpha=-1)
        dx.index_put_((row, n), pull, accumulate=True)
    if need_dy:
        dy = y * slope.sum(1)[..., None]
        dy.baddbmm_(slope.transpose(1, 2), x, alpha=-1)
        dy.index_put_((row, m), -pull, accumulate=True)
    return total, dx, dy, dweights


def _center(y: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of the points of each position, ``[r, 1, L]``; those of weight 0 do not count."""
    if weights is None:
        return y.mean(1, keepdim=True)
    present = (weights != 0).to(y.dtype)
    share = present / present.sum(1, keepdim=True).clamp_min(1)
    return torch.bmm(share[:, None], y)


def _factors(scale: Tensor, weights: Tensor | None, num_targets: int) -> Tensor:
    """What multiplies the slope of each target, ``[r, M]``."""
    if weights is None:
        return scale[:, None].expand(-1, num_targets)
    return scale[:, None] * weights


def _weighted(sums: Tensor, scale: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The whole sum ``[r]`` and its gradient in the weights, from the sum over all pairs ``[r]``,
    or with weights over those of each target ``[r, M]``.
    """
    if weights is None:
        return sums * scale, None
    dweights = sums * scale[:, None]
    return (dweights * weights).sum(1), dweights


def _power(
    difference: Tensor, exponent: float, *, need_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """|v|^α and α · |v|^(α-2) over the last axis."""
    length = torch.linalg.vector_norm(difference, dim=-1)
    return _powers(length, exponent, need_slope=need_slope)


def _powers(length: Tensor, exponent: float, *, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """|v|^α and α · |v|^(α-2) of lengths.

    Lengths whose square underflows count as zero: their slope is 0, and no exponent overflows.
    """
    powered = length if exponent == 1.0 else length.pow(exponent)
    if not need_slope:
        return powered, None
    smallest = torch.finfo(length.dtype).tiny ** 0.5
    slope = length.reciprocal() if exponent == 1.0 else length.pow(exponent - 2).mul_(exponent)
    return powered, slope.masked_fill_(length <= smallest, 0.0)
