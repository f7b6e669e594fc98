"""The custom op and its gradient.

The op takes blocks of rows: one matmul gives their logits, one kernel turns these into losses and
gradients, and two matmuls carry the gradients on to rows and weight. The backward pass scales the
stored gradients.
"""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.linear_cross_entropy.kernels import GRADIENT_SCALES, write_losses
from calm_kernels.matmul import add_matmul_fp32, matmul_fp32
from calm_kernels.operators import operator

__all__ = ["block_rows", "linear_cross_entropy_triton", "row_stride"]

# The logits of a block take at most this; each block also reads and writes the weight's gradient.
LOGITS_BYTES = 2**31
_PADDING = 16  # elements; rows then start where 16 bytes are read at once


def linear_cross_entropy_triton(
    rows: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, matmul_dtype: torch.dtype
) -> Tensor:
    """Mean cross-entropy, scalar in float32; see `calm_kernels.linear_cross_entropy`."""
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, weight)]
    return _loss_op(rows, weight, labels.contiguous(), ignore_index, matmul_dtype, *needs)[0]


def row_stride(vocab_size: int) -> int:
    """Elements from one row of logits to the next, padding included."""
    return -(-vocab_size // _PADDING) * _PADDING


def block_rows(num_rows: int, vocab_size: int, itemsize: int) -> int:
    """Rows of a block: as few blocks as memory allows, all of nearly the same size."""
    most = max(128, LOGITS_BYTES // (row_stride(vocab_size) * itemsize))
    num_blocks = -(-num_rows // most)
    return min(num_rows, most, -(-num_rows // (128 * num_blocks)) * 128)


@operator("linear_cross_entropy")
def _loss_op(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    matmul_dtype: torch.dtype,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, the scalar `factor`, and the gradients of rows and weight in float32, still to be
    multiplied by `factor`; a gradient that is not needed is empty.
    """
    loss, factor, drows, dweight = _outputs(rows, weight, need_rows, need_weight)
    cast_weight = weight.to(matmul_dtype)
    num_rows, vocab_size, stride = rows.shape[0], weight.shape[0], row_stride(weight.shape[0])
    losses = rows.new_zeros(num_rows, dtype=torch.float32)
    size = block_rows(num_rows, vocab_size, matmul_dtype.itemsize) if num_rows else 0
    logits = rows.new_empty(size, stride, dtype=matmul_dtype)
    need_gradient = need_rows or need_weight
    for start in range(0, num_rows, max(1, size)):
        block = slice(start, start + size)
        inputs = rows[block].to(matmul_dtype)
        dlogits = logits[: inputs.shape[0], :vocab_size]
        torch.mm(inputs, cast_weight.T, out=dlogits)
        write_losses(dlogits, labels[block], losses[block], ignore_index, need_gradient)
        if need_rows:
            drows[block] = matmul_fp32(dlogits, cast_weight)
        if need_weight:
            add_matmul_fp32(dweight, dlogits.T, inputs)
    count = (labels != ignore_index).sum()
    torch.div(losses.sum(), count, out=loss)
    torch.reciprocal(count.clamp(min=1) * GRADIENT_SCALES.get(matmul_dtype, 1.0), out=factor)
    return loss, factor, drows, dweight


def _outputs(
    rows: Tensor, weight: Tensor, need_rows: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, factor and gradients; the weight's starts at zero, because blocks add to it."""
    return (
        rows.new_empty((), dtype=torch.float32),
        rows.new_empty((), dtype=torch.float32),
        rows.new_empty(rows.shape if need_rows else (0,), dtype=torch.float32),
        weight.new_zeros(weight.shape if need_weight else (0,), dtype=torch.float32),
    )


@_loss_op.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    matmul_dtype: torch.dtype,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(rows, weight, need_rows, need_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the blocks left."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]
    ctx.needs = inputs[-2:]


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Stored gradients times upstream / count, in the dtypes of the inputs."""
    refuse_second_derivative("linear_cross_entropy")
    factor, *gradients = ctx.saved_tensors
    scaled: list[Tensor | None] = []
    for gradient, dtype, is_needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True):
        out = torch.empty_like(gradient, dtype=dtype)
        scaled.append(torch.mul(gradient, dloss * factor, out=out) if is_needed else None)
    return *scaled, *[None] * 5


_loss_op.register_autograd(_backward, setup_context=_save)
