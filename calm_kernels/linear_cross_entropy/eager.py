"""The torch backend: blocks of rows; gradients are computed while the logits are there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.precision import round_operand

__all__ = ["linear_cross_entropy_eager", "row_blocks"]

# A block must fit into the cache of a CPU (16 MB) and fill a GPU. Each block reads and writes the
# gradient of the weight once, so it must not have too few rows.
LOGITS_PER_BLOCK, LOGITS_PER_GPU_BLOCK = 2**22, 2**28
MIN_ROWS = 256


def linear_cross_entropy_eager(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [R]
    ignore_index: int,
    matmul_dtype: torch.dtype,
) -> Tensor:
    """Mean cross-entropy, scalar; see `calm_kernels.linear_cross_entropy`."""
    if not torch.is_grad_enabled():  # the function would compute gradients even so
        rows, weight = rows.detach(), weight.detach()
    return _LinearCrossEntropy.apply(rows, weight, labels, ignore_index, matmul_dtype)


def row_blocks(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    """Blocks of rows, each with as many logits as the device holds well."""
    num_logits = LOGITS_PER_BLOCK if rows.device.type == "cpu" else LOGITS_PER_GPU_BLOCK
    block_rows = max(MIN_ROWS, num_logits // vocab_size)
    for start in range(0, rows.shape[0], block_rows):
        yield slice(start, start + block_rows)


class _LinearCrossEntropy(Function):
    """Turns the logits of a block into softmax - onehot, their gradient up to the weight of a row.

    That weight, 1 / count or 0, multiplies smaller arrays instead: the rows for the gradient of
    `weight`, the result for the gradient of `rows`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        matmul_dtype: torch.dtype,
    ) -> Tensor:
        cast_weight = round_operand(weight, matmul_dtype)
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        drows = torch.empty_like(rows) if needs_rows else None
        dweight = cast_weight.new_zeros(cast_weight.shape[::-1]) if needs_weight else None  # [H, V]
        is_counted = labels != ignore_index
        count = is_counted.sum()
        share = is_counted[:, None].to(cast_weight.dtype) / count.clamp(min=1)  # [R, 1]
        targets = labels.where(is_counted, 0)[:, None]
        losses = cast_weight.new_empty(rows.shape[0])
        for block in row_blocks(rows, cast_weight.shape[0]):
            inputs = round_operand(rows[block], matmul_dtype)
            losses[block], dlogits = _losses(inputs @ cast_weight.T, targets[block])
            if drows is not None:
                drows[block] = (dlogits @ cast_weight).mul_(share[block])
            if dweight is not None:
                dweight += (inputs * share[block]).T @ dlogits
            del dlogits  # its memory serves the next block
        ctx.save_for_backward(drows, None if dweight is None else dweight.T.to(weight.dtype))
        return losses.where(is_counted, 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        drows, dweight = (None if d is None else d * dloss for d in ctx.saved_tensors)
        return drows, dweight, None, None, None


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row ``[rows]`` and its gradient, softmax - onehot ``[rows, V]``.

    The log-sum-exp follows from the softmax at the largest logit, which is at least 1 / V.
    """
    softmax = torch.softmax(logits, dim=-1)
    logsumexp = logits.amax(dim=-1) - softmax.amax(dim=-1).log()
    losses = logsumexp - logits.gather(1, targets)[:, 0]
    return losses, softmax.scatter_add_(1, targets, softmax.new_full(targets.shape, -1.0))
