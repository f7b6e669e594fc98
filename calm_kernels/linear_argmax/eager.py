"""The torch backend: blocks of logits with a running maximum and log-sum-exp.

The Triton backend comes here, too, with rows so wide that the library's matmul is faster.
"""

import torch
from torch import Tensor

from calm_kernels.matmul import matmul_fp32
from calm_kernels.precision import accumulation_dtype

__all__ = ["linear_argmax_eager"]

# A block must fit into the cache of a CPU (16 MB) and fill a GPU.
LOGITS_PER_BLOCK, LOGITS_PER_GPU_BLOCK = 2**22, 2**26
MAX_ROWS = 1024
FEW_ROWS = 4  # the tokens of one decoded chunk


def linear_argmax_eager(
    rows: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, largest entry and log-sum-exp, ``[R]`` each; see `calm_kernels.linear_argmax`."""
    dtype = accumulation_dtype(rows.dtype)
    num_logits = LOGITS_PER_BLOCK if rows.device.type == "cpu" else LOGITS_PER_GPU_BLOCK
    if 0 < rows.shape[0] <= MAX_ROWS and rows.shape[0] * weight.shape[0] <= num_logits:
        return _one_block(rows, weight.to(rows.dtype), with_logsumexp)
    index = rows.new_zeros(rows.shape[0], dtype=torch.int64)
    largest = rows.new_full((rows.shape[0],), -torch.inf, dtype=dtype)
    logsumexp = largest.clone() if with_logsumexp else None
    for start in range(0, rows.shape[0], MAX_ROWS):
        block = slice(start, start + MAX_ROWS)
        inputs = rows[block]
        block_vocab = num_logits // inputs.shape[0]
        for first in range(0, weight.shape[0], block_vocab):
            part = weight[first : first + block_vocab].to(rows.dtype)
            logits = _logits(inputs, part)  # [MAX_ROWS, block_vocab] at most
            high, where = logits.max(dim=-1)
            best = largest[block]
            # strictly larger, so that the first of equals stays; NaN is larger than all but NaN
            wins = (high > best) | (high.isnan() & ~best.isnan())
            largest[block] = torch.where(wins, high, best)
            index[block] = torch.where(wins, where + first, index[block])
            if logsumexp is not None:
                logsumexp[block] = torch.logaddexp(logsumexp[block], logits.logsumexp(dim=-1))
            del logits  # its memory serves the next block
    return index, largest, logsumexp


def _one_block(
    rows: Tensor, weight: Tensor, with_logsumexp: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All logits at once, where they are few: blocks need no comparison."""
    logits = _logits(rows, weight)
    largest, index = logits.max(dim=-1)
    return index, largest, logits.logsumexp(dim=-1) if with_logsumexp else None


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T``, summed in float32.

    A CPU is twice as fast the other way round where rows are few.
    """
    if rows.shape[0] <= FEW_ROWS:
        return matmul_fp32(weight, rows.T).T
    return matmul_fp32(rows, weight.T)
