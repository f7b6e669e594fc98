"""The layers as their formulas stand, in plain autograd; float64 works."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_residual_reference", "norm_linear_reference", "norm_swiglu_reference"]


def _rms_norm(rows: Tensor, norm_weight: Tensor, norm_eps: float) -> Tensor:
    square = rows.to(torch.promote_types(rows.dtype, torch.float32)).square()
    mean = square.mean(dim=-1, keepdim=True)
    return (rows / (mean + norm_eps).sqrt() * norm_weight).to(rows.dtype)


def norm_linear_reference(
    rows: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_linear`; rows are ``[R, H]``."""
    return _rms_norm(rows, norm_weight, norm_eps) @ torch.cat(list(weights)).T


def norm_swiglu_reference(
    rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_swiglu`; rows are ``[R, H]``."""
    normed = _rms_norm(rows, norm_weight, norm_eps)
    return F.silu(normed @ gate.T) * (normed @ up.T)


def linear_residual_reference(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See `calm_kernels.linear_residual`; rows are ``[R, H]``."""
    return residual + rows @ weight.T
