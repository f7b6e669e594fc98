"""E|v|^α of a Gaussian by one-dimensional quadrature: any dimension, any variances, any exponent in (0, 2).

v ~ N(m, diag σ²), p = α/2. With φ(t) = E exp(-t|v|²) and shrink z = 1 / (1 + 2tσ²),

    E|v|^α = 1/Γ(1-p) ∫_0^∞ t^-p φ B dt,   φ = Π z^½ exp(-t m² z),   B = Σ σ² z + m² z²
    ∂/∂m  = 2p/Γ(1-p) · m ∫ t^-p φ z dt
    ∂/∂σ² =  p/Γ(1-p) ·   ∫ t^-p φ (z - 2t m² z²) dt

The integrand is positive: nothing cancels. All samples of a patch share the nodes t = τ / S, so z and the
determinant are computed once a patch and every sum over L or over nodes is a batched matrix product.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GaussianTerm", "num_nodes", "quadrature"]

# S may differ between the samples that share nodes by this factor without loss of accuracy.
MAX_SPREAD = 256.0


class GaussianTerm(NamedTuple):
    """E|v|^α of each sample and its scaled derivatives; None where not asked for."""

    value: Tensor  # [R, N]
    slope: Tensor | None  # [R, N, L]: scale · ∂value/∂m = m · slope
    dvariance: Tensor | None  # [R, L]: scale · Σ_n ∂value/∂σ²


def num_nodes(dtype: torch.dtype) -> int:
    """Nodes that bring the quadrature error below the rounding error of `dtype`."""
    return 160 if dtype == torch.float64 else 48


@lru_cache(maxsize=64)
def _host_nodes(order: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Times τ_k and log weights of ∫ τ^-p f(τ) dτ / Γ(1-p) ≈ Σ_k exp(log_weight_k) f(τ_k), ``[Q]`` each.

    Trapezoid rule in u with ln τ = u - exp(-u - 1) + exp(u - 3): linear in the middle, where the integrand
    lives, and double exponential at both ends, which covers its algebraic tails (τ^(1-p) on the left; on
    the right as slow as τ^(-1/2-p) where a single dimension carries the variance).
    """
    tolerance, last = (38.0, 6.6) if dtype == torch.float64 else (17.0, 6.0)
    first = _solve_first(order, tolerance)
    count = num_nodes(dtype)
    u = torch.linspace(first, last, count, dtype=torch.float64)
    left, right = torch.exp(-u - 1), torch.exp(u - 3)
    log_time = u - left + right
    log_weight = (1 - order) * log_time + torch.log1p(left + right)
    log_weight += math.log((last - first) / (count - 1)) - math.lgamma(1 - order)
    return torch.exp(log_time).to(dtype), log_weight.to(dtype)


def _solve_first(order: float, tolerance: float) -> float:
    """The u at which the left tail τ^(1-p) has fallen to exp(-tolerance), by bisection."""
    low, high = -16.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        is_past = (1 - order) * (math.exp(-middle - 1) - middle) > tolerance
        low, high = (middle, high) if is_past else (low, middle)
    return low


def quadrature(
    offset2: Tensor,
    variance: Tensor,
    exponent: float,
    scale: Tensor,
    *,
    need_slope: bool,
    need_dvariance: bool,
) -> GaussianTerm:
    """E|v|^α and its derivatives; see the head of this file.

    Args:
        offset2: m², ``[R, N, L]``.
        variance: σ², ``[R, L]``.
        scale: ``[R]``, multiplies the derivatives.
    """
    order = exponent / 2
    time, log_weight = (node.to(variance.device) for node in _host_nodes(order, variance.dtype))

    tiny = torch.finfo(variance.dtype).tiny
    mean_square = offset2.sum(-1) + variance.sum(-1, keepdim=True)  # S, [R, N]
    largest, smallest = mean_square.amax(1, keepdim=True), mean_square.amin(1, keepdim=True)
    unit = (largest.clamp_min(tiny).sqrt() * smallest.clamp_min(tiny).sqrt())[..., None]
    variance, offset2 = variance[:, None] / unit, offset2 / unit  # [R, 1, L], [R, N, L]

    denominator = torch.addcmul(torch.ones_like(variance), time[:, None], variance, value=2)
    log_determinant = torch.log(denominator).sum(-1)  # [R, Q]
    shrink = denominator.reciprocal_()  # z, [R, Q, L]
    shrink2 = shrink.square()
    rate = torch.matmul(shrink, variance.mT).mT  # Σ σ²z, [R, 1, Q]
    rate = torch.baddbmm(rate, offset2, shrink2.mT)  # B, [R, N, Q]
    exponent_sum = torch.bmm(offset2, shrink.mT) * time  # t Σ m²z, [R, N, Q]
    density = torch.exp(log_weight - 0.5 * log_determinant[:, None] - exponent_sum)
    value = (density * rate).sum(-1) * unit[..., 0].pow(order)

    slope = dvariance = None
    if need_slope or need_dvariance:
        density *= (scale * order)[:, None, None] * unit.pow(order - 1)
    if need_slope:
        slope = torch.bmm(density, shrink).mul_(2)
    if need_dvariance:
        pull = torch.bmm(density.mT, offset2) * shrink2 * time[:, None]  # [R, Q, L]
        dvariance = torch.bmm(density.sum(1, keepdim=True), shrink)[:, 0] - 2 * pull.sum(1)
    return GaussianTerm(value, slope, dvariance)
