"""E|v|^α of a Gaussian v: the series where it is accurate, quadrature for the other positions.

On the CPU the positions past the guard are gathered. On a GPU that would synchronise at every call,
so there both run for every position and the guard selects.
"""

import torch
from torch import Tensor

from calm_kernels.energy_score.quadrature import GaussianTerm, num_nodes, quadrature
from calm_kernels.energy_score.row_blocks import in_row_blocks
from calm_kernels.energy_score.series import moments, series

__all__ = ["expected_power"]

# Below this latent size few positions are within the guard of the series, and quadrature is cheap.
SERIES_MIN_LATENT = 32
# Samples of a position share quadrature nodes while their E|v|² differ by at most this factor.
MAX_SPREAD = 256.0


def expected_power(
    offset2: Tensor,
    variance: Tensor,
    exponent: float,
    scale: Tensor,
    *,
    method: str = "auto",
    need_slope: bool,
    need_dvariance: bool,
) -> tuple[GaussianTerm, Tensor]:
    """E|v|^α with derivatives, and the relative variance r2 of |v|², ``[R, N]``.

    Args:
        offset2: m², ``[R, N, L]``.
        variance: σ², ``[R, L]``.
        exponent: α.
        scale: ``[R]``, multiplies the derivatives.
        method: ``"series"`` or ``"quadrature"`` for every position; ``"auto"``: the faster one that
            is accurate for the position, and in float64 always quadrature, exact to rounding.
        need_slope: whether to compute the derivative in m.
        need_dvariance: whether to compute the derivative in σ².
    """
    flags = {"need_slope": need_slope, "need_dvariance": need_dvariance}
    found = moments(offset2, variance)
    has_few = variance.shape[-1] < SERIES_MIN_LATENT or variance.dtype == torch.float64
    if method == "quadrature" or (method == "auto" and has_few):
        return _integrate(offset2, variance, exponent, scale, flags), found.r2
    term = series(offset2, found, exponent, scale, **flags)
    if method == "series":
        return term, found.r2

    is_past = found.is_past_guard()
    if variance.device.type != "cpu":
        exact = _integrate(offset2, variance, exponent, scale, flags)
        return _select(is_past, exact, term), found.r2
    past = is_past.nonzero()[:, 0]
    if past.numel():
        exact = _integrate(offset2[past], variance[past], exponent, scale[past], flags)
        for whole, part in zip(term, exact, strict=True):
            if whole is not None and part is not None:
                whole[past] = part
    return term, found.r2


def _select(rows: Tensor, this: GaussianTerm, other: GaussianTerm) -> GaussianTerm:
    """Take `this` in the marked rows, `other` elsewhere."""
    return GaussianTerm._make(
        None
        if left is None or right is None
        else torch.where(rows.view(-1, *[1] * (left.dim() - 1)), left, right)
        for left, right in zip(this, other, strict=True)
    )


def _integrate(
    offset2: Tensor, variance: Tensor, exponent: float, scale: Tensor, flags: dict[str, bool]
) -> GaussianTerm:
    """`quadrature` in blocks of rows; samples too different to share nodes get their own."""
    num_rows, num_samples, width = offset2.shape
    mean_square = offset2.sum(-1) + variance.sum(-1, keepdim=True)
    is_even = mean_square.amax(1) <= MAX_SPREAD * mean_square.amin(1)
    can_share = variance.device.type == "cpu" and bool(is_even.all())

    def shared(rows: slice) -> GaussianTerm:
        return quadrature(offset2[rows], variance[rows], exponent, scale[rows], **flags)

    def apart(rows: slice) -> GaussianTerm:
        value, slope, dvariance = quadrature(
            offset2[rows].reshape(-1, 1, width),
            variance[rows].repeat_interleave(num_samples, 0),
            exponent,
            scale[rows].repeat_interleave(num_samples, 0),
            **flags,
        )
        shape = (-1, num_samples, width)
        return GaussianTerm(
            value.view(shape[:2]),
            None if slope is None else slope.view(shape),
            None if dvariance is None else dvariance.view(shape).sum(1),
        )

    elements = num_nodes(variance.dtype) * width * (1 if can_share else num_samples)
    outputs = in_row_blocks(shared if can_share else apart, num_rows, elements, variance.device)
    return GaussianTerm._make(outputs)
