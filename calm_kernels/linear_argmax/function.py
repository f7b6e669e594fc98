"""The argmax as a custom op for torch.compile; nothing here is differentiable."""

import torch
from torch import Tensor

from calm_kernels.linear_argmax.kernels import find_maxima
from calm_kernels.operators import operator

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
    index, largest, logsumexp = _outputs(rows, with_logsumexp)
    if rows.shape[0]:
        find_maxima(rows, weight, index, largest, logsumexp, with_logsumexp=with_logsumexp)
    return index, largest, logsumexp


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
