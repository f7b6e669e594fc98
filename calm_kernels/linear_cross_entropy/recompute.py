"""The recompute form of the torch backend: between the passes only a log-sum-exp a row is kept.

The backward pass computes the logits again, tile by tile, and skips the two matmuls of a tile whose
gradients are all negligible. Which gradients count is decided entry by entry, so that the result
does not depend on tiles; sums run over tiles in one order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.backend import is_host_readable
from calm_kernels.linear_cross_entropy.eager import row_blocks
from calm_kernels.precision import round_operand

__all__ = ["linear_cross_entropy_recompute"]

# Rows and tokens of a tile where the host sees whether it can be skipped; 1 MiB of float32.
TILE_ROWS, TILE_TOKENS = 256, 1024


def linear_cross_entropy_recompute(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [R]
    ignore_index: int,
    matmul_dtype: torch.dtype,
    negligible: float,
) -> Tensor:
    """Mean cross-entropy, scalar; see `calm_kernels.linear_cross_entropy`."""
    return _Recomputed.apply(rows, weight, labels, ignore_index, matmul_dtype, negligible)


class _Recomputed(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        matmul_dtype: torch.dtype,
        negligible: float,
    ) -> Tensor:
        cast_weight = round_operand(weight, matmul_dtype)
        is_counted = labels != ignore_index
        targets = labels.where(is_counted, 0)
        logsumexp = cast_weight.new_empty(rows.shape[0])
        chosen = torch.empty_like(logsumexp)
        for block in row_blocks(rows, weight.shape[0]):
            logits = round_operand(rows[block], matmul_dtype) @ cast_weight.T
            logsumexp[block] = logits.logsumexp(dim=-1)
            chosen[block] = logits.gather(1, targets[block, None])[:, 0]
            del logits  # its memory serves the next block
        ctx.save_for_backward(rows, weight, labels, logsumexp)
        ctx.ignore_index, ctx.matmul_dtype, ctx.negligible = ignore_index, matmul_dtype, negligible
        return (logsumexp - chosen).where(is_counted, 0.0).sum() / is_counted.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        rows, weight, labels, logsumexp = ctx.saved_tensors
        cast_weight = round_operand(weight, ctx.matmul_dtype)
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        drows = torch.zeros_like(rows, dtype=cast_weight.dtype) if needs_rows else None
        dweight = torch.zeros_like(cast_weight) if needs_weight else None
        is_counted = labels != ctx.ignore_index
        share = dloss * is_counted[:, None] / is_counted.sum().clamp(min=1)  # [R, 1]
        can_skip = is_host_readable(rows) and not torch.compiler.is_compiling()
        for block, tokens in _tiles(rows, weight.shape[0]):
            inputs = round_operand(rows[block], ctx.matmul_dtype)
            logits = inputs @ cast_weight[tokens].T
            dlogits = logits.sub_(logsumexp[block, None]).exp_()
            _subtract_onehot(dlogits, labels[block], tokens.start)
            if ctx.negligible > 0.0:
                is_kept = ~(dlogits.abs() < ctx.negligible)  # NaN stays
                is_kept &= is_counted[block, None]
                if can_skip and not is_kept.any():
                    continue
                dlogits = dlogits.where(is_kept, 0.0)
            if drows is not None:
                drows[block] += (dlogits @ cast_weight[tokens]) * share[block]
            if dweight is not None:
                dweight[tokens] += dlogits.T @ (inputs * share[block])
            del logits, dlogits  # their memory serves the next tile
        gradients = [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in ((drows, rows), (dweight, weight))
        ]
        return *gradients, None, None, None, None


def _tiles(rows: Tensor, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of each tile; on a GPU whole rows, as many as fill it."""
    if not is_host_readable(rows):
        yield from ((block, slice(0, vocab_size)) for block in row_blocks(rows, vocab_size))
        return
    for start in range(0, rows.shape[0], TILE_ROWS):
        for token in range(0, vocab_size, TILE_TOKENS):
            yield slice(start, start + TILE_ROWS), slice(token, token + TILE_TOKENS)


def _subtract_onehot(softmax: Tensor, labels: Tensor, first: int) -> None:
    """Softmax of the tokens from `first` on becomes softmax - onehot, in place."""
    column = labels - first
    is_here = (column >= 0) & (column < softmax.shape[1])
    ones = is_here[:, None].to(softmax.dtype)
    softmax.scatter_add_(1, column.where(is_here, 0)[:, None], -ones)
