"""The argmax as a custom op for torch.compile; nothing here is differentiable."""

import torch
from torch import Tensor

from calm_kernels.linear_argmax.eager import linear_argmax_eager
from calm_kernels.linear_argmax.kernels import argmax_setting, find_maxima
from calm_kernels.operators import operator
from calm_kernels.tuning import architecture

__all__ = ["linear_argmax_triton"]


def linear_argmax_triton(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, largest entry and log-sum-exp, ``[R]`` each; see `calm_kernels.linear_argmax`."""
    index, largest, logsumexp = _argmax_op(rows, weight.to(rows.dtype), with_logsumexp)
    return index, largest, logsumexp if with_logsumexp else None


@operator("linear_argmax")
def _argmax_op(rows: Tensor, weight: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Index, largest entry and log-sum-exp (empty if not asked for)."""
    if _is_fused(rows, with_logsumexp):
        found = _outputs(rows, with_logsumexp)
        if rows.shape[0]:
            find_maxima(rows, weight, *found, with_logsumexp=with_logsumexp)
        return found
    index, largest, logsumexp = linear_argmax_eager(rows, weight, with_logsumexp)
    return index, largest, largest.new_empty(0) if logsumexp is None else logsumexp


def _is_fused(rows: Tensor, with_logsumexp: bool) -> bool:
    """Whether the kernels are faster than the library's matmul and logits in memory."""
    num_rows, width = rows.shape
    arch = architecture(rows.device)
    launch = argmax_setting(num_rows, rows.dtype, arch, with_total=with_logsumexp)
    return width <= launch.fused_width


def _outputs(rows: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rows.shape[0]
    return (
        rows.new_empty(num_rows, dtype=torch.int64),
        rows.new_empty(num_rows, dtype=torch.float32),
        rows.new_empty(num_rows if with_logsumexp else 0, dtype=torch.float32),
    )


@_argmax_op.register_fake
def _(rows: Tensor, weight: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(rows, with_logsumexp)
