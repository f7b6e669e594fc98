"""The torch backend: blocks of rows whose gradients are taken while their logits are at hand."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from calm_kernels.precision import accumulation_dtype

__all__ = ["linear_cross_entropy_eager"]

LOGITS_PER_BLOCK = 2**22
MIN_ROWS = 64


def linear_cross_entropy_eager(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [R]
    ignore_index: int,
    product_dtype: torch.dtype,
) -> Tensor:
    """Mean cross-entropy, scalar; see `calm_kernels.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(rows, weight, labels, ignore_index, product_dtype)


class _LinearCrossEntropy(Function):
    """Computes d loss / d logits = (softmax - onehot) / count in place of the logits, and both products with it."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        product_dtype: torch.dtype,
    ) -> Tensor:
        dtype = accumulation_dtype(product_dtype)
        words = weight.to(product_dtype).to(dtype)
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        drows = torch.empty_like(rows) if needs_rows else None
        dweight = torch.zeros_like(words) if needs_weight else None
        is_counted = labels != ignore_index
        count = is_counted.sum()
        share = is_counted / count.clamp(min=1).to(dtype)  # [R] weight of a row in the mean
        targets = labels.where(is_counted, 0)[:, None]
        total = words.new_zeros(())
        block_rows = max(MIN_ROWS, LOGITS_PER_BLOCK // max(1, weight.shape[0]))
        for start in range(0, rows.shape[0], block_rows):
            block = slice(start, start + block_rows)
            inputs = rows[block].to(product_dtype).to(dtype)
            logits = inputs @ words.T  # [block_rows, V]
            logsumexp = logits.logsumexp(dim=-1, keepdim=True)
            losses = logsumexp - logits.gather(1, targets[block])
            total += losses[:, 0].where(is_counted[block], 0.0).sum()
            if not (needs_rows or needs_weight):
                continue
            weights = share[block, None]
            dlogits = logits.sub_(logsumexp).exp_().mul_(weights)
            dlogits.scatter_add_(1, targets[block], -weights)
            if drows is not None:
                drows[block] = dlogits @ words
            if dweight is not None:
                dweight.addmm_(dlogits.T, inputs)
        ctx.save_for_backward(drows, None if dweight is None else dweight.to(weight.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        drows, dweight = (None if d is None else d * dloss for d in ctx.saved_tensors)
        return drows, dweight, None, None, None
