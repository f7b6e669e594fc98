"""E|v|^α of a Gaussian by the moments of |v|²: accurate where |v|² has a small relative variance.

v ~ N(m, diag σ²) in L dimensions, p = α/2, S = E|v|², κ_k the cumulants of |v|² and r_k = κ_k / S^k:

    κ2 = Σ 2σ²(σ² + 2m²),   κ3 = Σ 8σ⁴(σ² + 3m²),   κ4 = Σ 48σ⁶(σ² + 4m²)
    E|v|^α = S^p · h,   h = 1 + C2·r2 + C3·r3 + C4·(r4 + 3·r2²) + 10·C5·r2·r3 + 15·C6·r2³

C_k are the binomial coefficients of p: this expands (|v|²)^p about S and keeps every term up to 1/L³.
Powers of the relative variance a = σ² / max σ² are shared by the samples of a patch, so the sums over L
and the gradient are batched products with the matrix ``[a⁰, a¹, a², a³]``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_kernels.energy_score.quadrature import GaussianTerm

__all__ = ["Moments", "moments", "series"]


class Moments(NamedTuple):
    """What the series needs of a patch; r_k as at the head of this file."""

    powers: Tensor  # [R, 4, L]: a^k
    unit: Tensor  # [R, 1]: max σ²
    mean_square: Tensor  # [R, N]: S
    r2: Tensor  # [R, N]
    r3: Tensor
    r4: Tensor


def moments(offset2: Tensor, variance: Tensor) -> Moments:
    """Relative cumulants of |v|² from m², ``[R, N, L]``, and σ², ``[R, L]``; free of overflow."""
    tiny = torch.finfo(variance.dtype).tiny
    unit = variance.amax(-1, keepdim=True).clamp_min(tiny)
    a = variance / unit
    a2 = a * a
    powers = torch.stack([torch.ones_like(a), a, a2, a2 * a], dim=1)  # [R, 4, L]
    # S alone is summed outside the product: reduced-precision matmul settings must not touch it.
    mean_square = offset2.sum(-1) + variance.sum(-1, keepdim=True)
    ratio = unit / mean_square.clamp_min(tiny)  # max σ² / S
    v2, v3, v4 = (powers[:, 1:] * a[:, None]).sum(-1).unsqueeze(1).unbind(-1)  # Σ a^k, [R, 1]
    weighted = torch.bmm(offset2, powers[:, 1:].mT)  # Σ m²a^k, [R, N, 3]
    m1, m2, m3 = (weighted / mean_square.clamp_min(tiny)[..., None]).unbind(-1)
    r2 = ratio * (2 * ratio * v2 + 4 * m1)
    r3 = ratio**2 * (8 * ratio * v3 + 24 * m2)
    r4 = ratio**3 * (48 * ratio * v4 + 192 * m3)
    return Moments(powers, unit, mean_square, r2, r3, r4)


def series(
    offset2: Tensor,
    found: Moments,
    exponent: float,
    scale: Tensor,
    *,
    need_slope: bool,
    need_dvariance: bool,
) -> GaussianTerm:
    """E|v|^α and its derivatives from the moments; arguments as `quadrature`.

    With H_k = ∂h/∂r_k and A = p·h - Σ k·r_k·H_k,

        ∂/∂m = m · S^(p-1) [2A + 8·H2·σ²/S + 48·H3·(σ²/S)² + 384·H4·(σ²/S)³]
    """
    p = exponent / 2
    c2 = p * (p - 1) / 2
    c3 = c2 * (p - 2) / 3
    c4 = c3 * (p - 3) / 4
    c5 = c4 * (p - 4) / 5
    c6 = c5 * (p - 5) / 6
    powers, unit, mean_square, r2, r3, r4 = found
    h = 1 + r2 * (c2 + r2 * (3 * c4 + 15 * c6 * r2) + 10 * c5 * r3) + c3 * r3 + c4 * r4
    value = mean_square.pow(p) * h
    if not (need_slope or need_dvariance):
        return GaussianTerm(value, None, None)

    h2 = c2 + 6 * c4 * r2 + 10 * c5 * r3 + 45 * c6 * r2**2
    h3 = c3 + 10 * c5 * r2
    inner = p * h - 2 * r2 * h2 - 3 * r3 * h3 - 4 * c4 * r4
    safe_square = mean_square.clamp_min(torch.finfo(unit.dtype).tiny)
    ratio = unit / safe_square
    outer = safe_square.pow(p - 1) * scale[:, None]
    columns = [2 * inner, 8 * h2 * ratio, 48 * h3 * ratio**2, 384 * c4 * ratio**3]
    coefficients = torch.stack(columns, dim=-1) * outer[..., None]  # [R, N, 4]

    slope = torch.bmm(coefficients, powers) if need_slope else None
    dvariance = None
    if need_dvariance:
        # ∂/∂σ² = ½ Σ_n Σ_k K_k a^k  +  ½ Σ_k k a^(k-1) Σ_n K_k m² / max σ²
        own = torch.bmm(coefficients.sum(1, keepdim=True), powers)[:, 0]
        cross = torch.bmm((coefficients[..., 1:] / unit[..., None]).mT, offset2)  # [R, 3, L]
        order = torch.arange(1, 4, dtype=cross.dtype, device=cross.device)[:, None]
        dvariance = (own + (cross * powers[:, :3] * order).sum(1)) / 2
    return GaussianTerm(value, slope, dvariance)
