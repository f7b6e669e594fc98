"""The torch backend: blocks of logits, their running maximum and running log-sum-exp."""

import torch
from torch import Tensor

from calm_kernels.precision import accumulation_dtype
from calm_kernels.products import multiply

__all__ = ["linear_argmax_eager"]

LOGITS_PER_BLOCK, MAX_ROWS = 2**20, 1024


def linear_argmax_eager(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, largest entry and log-sum-exp, ``[R]`` each; see `calm_kernels.linear_argmax`."""
    dtype = accumulation_dtype(rows.dtype)
    index = rows.new_empty(rows.shape[0], dtype=torch.int64)
    largest = rows.new_empty(rows.shape[0], dtype=dtype)
    logsumexp = torch.empty_like(largest) if with_logsumexp else None
    for start in range(0, rows.shape[0], MAX_ROWS):
        block = slice(start, start + MAX_ROWS)
        best, where, total = _scan(rows[block].to(dtype), weight, rows.dtype, with_logsumexp)
        index[block], largest[block] = where, best
        if logsumexp is not None and total is not None:
            logsumexp[block] = total
    return index, largest, logsumexp


def _scan(
    rows: Tensor, weight: Tensor, product_dtype: torch.dtype, with_logsumexp: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Largest logit, its word and the log-sum-exp of a block of rows, over all blocks of words."""
    best = where = total = None
    num_words = LOGITS_PER_BLOCK // max(1, rows.shape[0])
    for start in range(0, weight.shape[0], num_words):
        words = weight[start : start + num_words].to(product_dtype).to(rows.dtype)
        logits = multiply(rows, words)  # [rows, num_words]
        high, at = logits.max(dim=-1)
        if best is None or where is None:
            best, where = high, at
        else:
            wins = (high > best) | (
                high.isnan() & ~best.isnan()
            )  # strict: the first of equals stays
            best, where = torch.where(wins, high, best), torch.where(wins, at + start, where)
        if with_logsumexp:
            part = logits.logsumexp(dim=-1)
            total = part if total is None else torch.logaddexp(total, part)
    assert best is not None and where is not None  # the vocabulary is not empty
    return best, where, total
