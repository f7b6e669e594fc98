"""The torch backend: the library's matmuls, one for each weight, so that no weight is copied."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_residual_eager", "norm_linear_eager", "norm_swiglu_eager"]


def norm_linear_eager(
    rows: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_linear`; rows are ``[R, H]``."""
    normed = F.rms_norm(rows, norm_weight.shape, norm_weight, norm_eps)
    return torch.cat([F.linear(normed, weight) for weight in weights], dim=-1)


def norm_swiglu_eager(
    rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_swiglu`; rows are ``[R, H]``."""
    normed = F.rms_norm(rows, norm_weight.shape, norm_weight, norm_eps)
    return F.silu(F.linear(normed, gate)) * F.linear(normed, up)


def linear_residual_eager(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See `calm_kernels.linear_residual`; rows are ``[R, H]``."""
    return residual + F.linear(rows, weight)
