"""Device code of E|v|^α for v ~ N(m, diag σ²): series.py and quadrature in registers, values and
slopes together.

Tiles are ``[OUTER, BLOCK_N, LANES, INNER]`` (kernels.py), quantities of a sample ``[BLOCK_N]``.
"""

import triton
import triton.language as tl

from calm_kernels.device import (
    exp2,
    power_terms,
    reciprocal,
    sum_features,
    sum_log2_features,
)

__all__ = ["add_quadrature", "series"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def series(
    offset2, variance, mean_square, r2, r3, r4, is_far,
    EXPONENT: tl.constexpr, NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """E|v|^α = S^p h(r2, r3, r4) and its slopes by the formulas of series.py; all zero where
    `is_far`.
    """
    P: tl.constexpr = EXPONENT / 2
    C2: tl.constexpr = P * (P - 1) / 2
    C3: tl.constexpr = C2 * (P - 2) / 3
    C4: tl.constexpr = C3 * (P - 3) / 4
    C5: tl.constexpr = C4 * (P - 4) / 5
    C6: tl.constexpr = C5 * (P - 5) / 6
    h = 1 + r2 * (C2 + r2 * (3 * C4 + 15 * C6 * r2) + 10 * C5 * r3) + C3 * r3 + C4 * r4
    h2 = C2 + 6 * C4 * r2 + 10 * C5 * r3 + 45 * C6 * r2 * r2
    h3 = C3 + 10 * C5 * r2
    inner = P * h - 2 * r2 * h2 - 3 * r3 * h3 - 4 * C4 * r4
    value, outer = power_terms(mean_square, EXPONENT, FAST)  # S^p and α S^(p-1)
    value = tl.where(is_far, 0.0, value * h)
    outer = outer * (1 / EXPONENT)
    inverse = reciprocal(tl.maximum(mean_square, _TINY))
    k0 = tl.where(is_far, 0.0, outer * 2 * inner)[None, :, None, None]
    k1 = tl.where(is_far, 0.0, outer * 8 * h2)[None, :, None, None]
    k2 = tl.where(is_far, 0.0, outer * 48 * h3)[None, :, None, None]
    k3 = tl.where(is_far, 0.0, outer * (384 * C4))[None, :, None, None]
    a = variance * inverse[None, :, None, None]
    slope = k0 + a * (k1 + a * (k2 + a * k3))
    dvariance = slope
    if NEED_POSTERIOR:
        b = offset2 * inverse[None, :, None, None]
        dvariance = 0.5 * (slope + b * (k1 + a * (2 * k2 + 3 * a * k3)))
    return value, slope, dvariance


@triton.jit
def add_quadrature(
    value, slope, dvariance, offset2, variance, mean_square, num_nodes, first, step, log_scale,
    EXPONENT: tl.constexpr, NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add E|v|^α and its slopes by the trapezoid rule in u, tS = exp(u - e^-u): nodes of each
    sample's own scale.

    Where the series holds there are no nodes: nothing is added and no time is spent.
    """
    P: tl.constexpr = EXPONENT / 2
    # Where S is 0 all is 0: no node may overflow there.
    inverse = tl.where(mean_square > _TINY, reciprocal(tl.maximum(mean_square, _TINY)), 0.0)
    unit = power_terms(mean_square, EXPONENT, FAST)[1] * (1 / EXPONENT)  # S^(p-1)
    for k in range(num_nodes):
        u = first + step * k
        decay = tl.exp(-u)
        log_time = u - decay
        log_weight = (1 - P) * log_time + tl.log(1 + decay) + log_scale
        time = tl.exp(log_time) * inverse  # [BLOCK_N]
        denominator = 1 + (2 * time)[None, :, None, None] * variance
        shrink = reciprocal(denominator)
        pulled = offset2 * shrink
        rate = sum_features((variance + pulled) * shrink)
        log_determinant = sum_log2_features(denominator, FAST)
        exponent = log_weight - time * sum_features(pulled)
        density = exp2(exponent * _LOG2_E - 0.5 * log_determinant, FAST) * unit
        value += density * rate
        density = (2 * P) * density
        slope += density[None, :, None, None] * shrink
        if NEED_POSTERIOR:
            growth = (time * density)[None, :, None, None]
            dvariance += shrink * ((0.5 * density)[None, :, None, None] - growth * pulled)
    return value, slope, dvariance
