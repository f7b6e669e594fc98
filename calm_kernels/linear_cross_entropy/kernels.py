"""Cross-entropy of a row of logits, and its gradient written over the logits.

A program reads its row twice: for the log-sum-exp, and for softmax - onehot. A lane reads 16 bytes
at a time and keeps its own maximum and sum; the lanes are combined once, at the end. Rows whose
label is ignored are filled with zeros and never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2, log2
from calm_kernels.tuning import (
    Constants,
    architecture,
    launch_options,
    setting,
    use_fast_math,
    warp_size,
)

__all__ = ["GRADIENT_SCALES", "loss_constants", "loss_kernel", "write_losses"]

# A softmax over 1e5 tokens would lose bits in float16, whose smallest normal number is 6e-5.
GRADIENT_SCALES = {torch.float16: 1024.0}

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)  # finite, so that no difference is inf - inf


@triton.jit
def _load(logits_ptr, column, vocab_size, stride_r, EVICTION: tl.constexpr):
    """Logits of these columns; -inf from `vocab_size` to the end of the padded row."""
    logits = tl.load(
        logits_ptr + column, mask=column < stride_r, other=0.0, eviction_policy=EVICTION
    )
    return tl.where(column < vocab_size, logits.to(tl.float32), float("-inf"))


@triton.jit
def _logsumexp(
    logits_ptr, column, vocab_size, stride_r, LANES: tl.constexpr, INNER: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Largest logit m of the row, and log2 Σ exp(logit - m)."""
    high = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, LANES * INNER):
        logits = _load(logits_ptr, start + column, vocab_size, stride_r, "evict_last")
        raised = tl.maximum(high, tl.max(logits, axis=1))
        terms = exp2((logits - raised[:, None]) * _LOG2_E, FAST)
        total = total * exp2((high - raised) * _LOG2_E, FAST) + tl.sum(terms, axis=1)
        high = raised
    largest = tl.max(high, axis=0)
    total = tl.sum(total * exp2((high - largest) * _LOG2_E, FAST), axis=0)
    return largest, log2(total, FAST)


@triton.jit
def _write_gradient(
    logits_ptr, column, label, largest, logarithm, vocab_size, stride_r, scale, LANES: tl.constexpr,
    INNER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """scale · (softmax - onehot) over the logits."""
    for start in range(0, vocab_size, LANES * INNER):
        here = start + column
        logits = _load(logits_ptr, here, vocab_size, stride_r, "evict_first")
        softmax = exp2((logits - largest) * _LOG2_E - logarithm, FAST)
        gradient = scale * tl.where(here == label, softmax - 1.0, softmax)
        gradient = gradient.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + here, gradient, mask=here < stride_r)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_kernel(
    logits_ptr, labels_ptr, losses_ptr, vocab_size, stride_r, ignore_index, scale,
    NEED_GRADIENT: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """loss = log Σ exp(logits) - logit of the label; 0 where the label is ignored, NaN where it is
    out of range. Rows are `stride_r` apart and padded to it.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * stride_r
    lane, inner = tl.arange(0, LANES), tl.arange(0, INNER)
    column = lane[:, None] * INNER + inner[None, :]  # [LANES, INNER]
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRADIENT:
            zeros = tl.zeros([LANES, INNER], logits_ptr.dtype.element_ty)
            for start in range(0, vocab_size, LANES * INNER):
                here = start + column
                tl.store(logits_ptr + here, zeros, mask=here < stride_r)
    else:
        is_token = (label >= 0) & (label < vocab_size)
        chosen = tl.load(logits_ptr + label, mask=is_token, other=float("nan")).to(tl.float32)
        largest, logarithm = _logsumexp(
            logits_ptr, column, vocab_size, stride_r, LANES, INNER, FAST
        )
        tl.store(losses_ptr + row, largest - chosen + logarithm * _LN_2)
        if NEED_GRADIENT:
            _write_gradient(
                logits_ptr, column, label, largest, logarithm, vocab_size, stride_r, scale, LANES,
                INNER, FAST,
            )  # fmt: skip


def loss_constants(
    vocab_size: int, dtype: torch.dtype, arch: str, *, need_gradient: bool, has_fast_math: bool
) -> Constants:
    """Compile-time constants and compiler options of `loss_kernel`."""
    launch = setting("linear_cross_entropy", arch, vocab_size)
    inner = 16 // dtype.itemsize
    vectors = launch.features_per_lane // 8  # of 16 bytes
    chosen = {
        "NEED_GRADIENT": need_gradient,
        "LANES": vectors * launch.num_warps * warp_size(arch),
        "INNER": inner,
        "FAST": has_fast_math,
    }
    return chosen, launch_options(launch)


def write_losses(
    logits: Tensor, labels: Tensor, losses: Tensor, ignore_index: int, need_gradient: bool
) -> None:
    """Launch: losses of a block of rows; on request logits become their gradient."""
    num_rows, vocab_size = logits.shape
    chosen, options = loss_constants(
        vocab_size, logits.dtype, architecture(logits.device), need_gradient=need_gradient,
        has_fast_math=use_fast_math(),
    )  # fmt: skip
    with torch.cuda.device_of(logits):
        loss_kernel[(num_rows,)](
            logits, labels, losses, vocab_size, logits.stride(0), ignore_index,
            GRADIENT_SCALES.get(logits.dtype, 1.0), **chosen, **options,
        )  # fmt: skip
