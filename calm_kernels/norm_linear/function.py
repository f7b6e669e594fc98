"""The layers as torch sees them: custom operators without gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_kernels.norm_linear.kernels import (
    launch_linear_residual,
    launch_norm_linear,
    launch_norm_swiglu,
)
from calm_kernels.operators import operator

__all__ = ["linear_residual_triton", "norm_linear_triton", "norm_swiglu_triton"]


def norm_linear_triton(
    rows: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_linear`; rows are ``[R, H]``."""
    first, second, third = (*weights, None, None)[:3]
    return _norm_linear_op(rows.contiguous(), norm_weight, first, second, third, norm_eps)


def norm_swiglu_triton(
    rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, norm_eps: float
) -> Tensor:
    """See `calm_kernels.norm_swiglu`; rows are ``[R, H]``."""
    return _norm_swiglu_op(rows.contiguous(), norm_weight, gate, up, norm_eps)


def linear_residual_triton(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See `calm_kernels.linear_residual`; rows are ``[R, H]``."""
    return _linear_residual_op(rows.contiguous(), weight, residual.contiguous())


@operator("norm_linear")
def _norm_linear_op(
    rows: Tensor, norm_weight: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    weights = [weight for weight in (first, second, third) if weight is not None]
    out = rows.new_empty(len(rows), sum(map(len, weights)))
    with torch.cuda.device_of(rows):
        launch_norm_linear(rows, norm_weight, weights, out, norm_eps)
    return out


@_norm_linear_op.register_fake
def _(
    rows: Tensor, norm_weight: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    outputs = sum(len(weight) for weight in (first, second, third) if weight is not None)
    return rows.new_empty(rows.shape[0], outputs)


@operator("norm_swiglu")
def _norm_swiglu_op(
    rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, norm_eps: float
) -> Tensor:
    out = rows.new_empty(len(rows), len(gate))
    with torch.cuda.device_of(rows):
        launch_norm_swiglu(rows, norm_weight, gate, up, out, norm_eps)
    return out


@_norm_swiglu_op.register_fake
def _(rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, norm_eps: float) -> Tensor:
    return rows.new_empty(rows.shape[0], gate.shape[0])


@operator("linear_residual")
def _linear_residual_op(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    out = torch.empty_like(residual)
    with torch.cuda.device_of(rows):
        launch_linear_residual(rows, weight, residual, out)
    return out


@_linear_residual_op.register_fake
def _(rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)
