"""Argmax over the vocabulary in two stages: splits of the vocabulary, then the splits of a row.

A program of `partial_kernel` holds BLOCK_R rows and goes through its split of the vocabulary,
BLOCK_V tokens at a time. It keeps the running maximum, its token and, on request, the running sum
of exponentials. Blocks of tokens and of features are one loop, so that while a block is compared
the next one is on its way from memory. Programs of one split run at the same time, so that its part
of the weight is read from memory once. Everywhere the first of equal entries wins, and NaN counts
as larger than any number.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.device import exp2, log2
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import (
    Constants,
    Launch,
    architecture,
    launch_options,
    num_processors,
    setting,
    use_fast_math,
)

__all__ = [
    "argmax_setting",
    "constants",
    "find_maxima",
    "num_splits",
    "partial_kernel",
    "reduce_constants",
    "reduce_kernel",
]

# A program of the second stage holds this many entries.
_REDUCE_ENTRIES = 4096
# Numbers of waves tried beyond the fewest, so that the last wave leaves no processors idle.
_MORE_WAVES = 7

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INFINITY = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(left, right):
    """The larger of two numbers, NaN if one is."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _first_largest(value, token, other_value, other_token):
    """(value, token) of the pair that wins: NaN, then the larger value, then the smaller token."""
    is_nan, is_other_nan = value != value, other_value != other_value
    is_equal = (value == other_value) | (is_nan & is_other_nan)
    is_above = (value > other_value) | (is_nan & ~is_other_nan)
    wins = is_above | (is_equal & (token < other_token))
    return tl.where(wins, value, other_value), tl.where(wins, token, other_token)


@triton.jit
def _finite(x):
    """`x`, or 0 where it is infinite: what exponents are taken relative to."""
    return tl.where(tl.abs(x) == _INFINITY, 0.0, x)


@triton.jit
def _rescaled(total, before, after, FAST: tl.constexpr):
    """Σ exp(· - before) as Σ exp(· - after), a maximum that has grown."""
    is_infinite = (tl.abs(before) == _INFINITY) | (tl.abs(after) == _INFINITY)
    change = tl.where(is_infinite, 0.0, _finite(before) - _finite(after))
    return tl.where(before == -_INFINITY, 0.0, total * exp2(change * _LOG2_E, FAST))


@triton.jit(do_not_specialize=["num_rows", "tokens_per_split"])
def partial_kernel(
    hidden_ptr, weight_ptr, high_ptr, token_ptr, total_ptr, num_rows, vocab_size, tokens_per_split,
    width, stride_r, stride_rh, stride_v, stride_vh, IS_EVEN: tl.constexpr,
    WITH_TOTAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of each row and split: largest logit, its token, Σ exp(logit - largest); ``[splits, R]``."""
    wait_for_previous(OVERLAP)
    split = tl.program_id(1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    safe = tl.minimum(row, (num_rows - 1 - first_row).to(tl.int32))
    hidden_ptr += first_row * stride_r
    first = split * tokens_per_split
    weight_ptr += first.to(tl.int64) * stride_v
    last = tl.minimum(first + tokens_per_split, vocab_size)
    token, feature = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + safe[:, None] * stride_r + feature[None, :] * stride_rh
    high = tl.full([BLOCK_R], -_INFINITY, tl.float32)
    best = tl.full([BLOCK_R], 0, tl.int32) + first
    total = tl.zeros([BLOCK_R], tl.float32)
    tl.assume(width > 0)  # or the compiler makes a second loop, without features
    for start in tl.range(first, last, BLOCK_V, flatten=True):
        # Past the end the last token is repeated, which changes nothing: the first of equals wins.
        num_left = last - start
        safe_token = tl.minimum(token, num_left - 1)
        weight_offs = safe_token[None, :] * stride_v + feature[:, None] * stride_vh
        weight_ptrs = weight_ptr + (start - first).to(tl.int64) * stride_v + weight_offs
        logits = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for done in range(0, width, BLOCK_H):
            if IS_EVEN:
                rows = tl.load(hidden_ptrs + done * stride_rh)  # [BLOCK_R, BLOCK_H]
                weight = tl.load(weight_ptrs + done * stride_vh)  # [BLOCK_H, BLOCK_V]
            else:
                is_feature = feature < width - done
                rows = tl.load(hidden_ptrs + done * stride_rh, mask=is_feature[None, :], other=0.0)
                weight = tl.load(
                    weight_ptrs + done * stride_vh, mask=is_feature[:, None], other=0.0
                )
            logits = tl.dot(
                rows.to(DOT_DTYPE), weight.to(DOT_DTYPE), logits, input_precision=PRECISION
            )
        if WITH_TOTAL:  # noqa: SIM102 - the compiler decides the first condition, the GPU the second
            if num_left < BLOCK_V:  # the last block, which counts no token twice
                logits = tl.where(token[None, :] < num_left, logits, -_INFINITY)
        here = tl.reduce(logits, 1, _larger)
        is_high = (logits == here[:, None]) | (logits != logits)
        where = tl.min(tl.where(is_high, token[None, :], _NO_TOKEN), axis=1) + start
        wins = (here > high) | ((here != here) & (high == high))
        raised = tl.where(wins, here, high)
        if WITH_TOTAL:
            terms = exp2((logits - _finite(raised)[:, None]) * _LOG2_E, FAST)
            total = _rescaled(total, high, raised, FAST) + tl.sum(terms, axis=1)
        high = raised
        best = tl.where(wins, where, best)
    offs = split.to(tl.int64) * num_rows + first_row + row
    is_row = row < num_rows - first_row
    tl.store(high_ptr + offs, high, mask=is_row)
    tl.store(token_ptr + offs, best, mask=is_row)
    if WITH_TOTAL:
        tl.store(total_ptr + offs, total, mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def reduce_kernel(
    high_ptr, token_ptr, total_ptr, index_ptr, largest_ptr, logsumexp_ptr, num_rows, num_splits,
    WITH_TOTAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The splits of each row to its index, largest logit and log-sum-exp, ``[R]``."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)
    safe = tl.minimum(row, num_rows - 1)
    offs = split.to(tl.int64)[:, None] * num_rows + safe[None, :]
    mask = (split < num_splits)[:, None]
    high = tl.load(high_ptr + offs, mask=mask, other=-_INFINITY)  # [BLOCK_S, BLOCK_R]
    token = tl.load(token_ptr + offs, mask=mask, other=_NO_TOKEN)
    largest, best = tl.reduce((high, token), 0, _first_largest)
    tl.store(index_ptr + row, best.to(tl.int64), mask=row < num_rows)
    tl.store(largest_ptr + row, largest, mask=row < num_rows)
    if WITH_TOTAL:
        total = tl.load(total_ptr + offs, mask=mask, other=0.0)
        total = tl.sum(_rescaled(total, high, largest[None, :], FAST), axis=0)
        is_empty = total == 0.0  # every logit is -inf
        logarithm = log2(tl.where(is_empty, 1.0, total), FAST) * _LN_2
        logsumexp = tl.where(is_empty, largest, _finite(largest) + logarithm)
        tl.store(logsumexp_ptr + row, logsumexp, mask=row < num_rows)


def constants(
    num_rows: int, width: int, dtype: torch.dtype, arch: str, *, with_total: bool,
    has_fast_math: bool, can_round: bool = True,
) -> Constants:  # fmt: skip
    """Compile-time constants and compiler options of the first stage.

    float32 is multiplied as three tf32 matmuls, whose error is that of float32 (AMD: float32). The
    interpreter multiplies 16-bit numbers in float32 (`can_round` is False), because it would read
    their bits as integers.
    """
    launch = argmax_setting(num_rows, dtype, arch, with_total=with_total)
    is_rounded = dtype.itemsize == 2 and can_round
    half = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    chosen = {
        "IS_EVEN": width % launch.block_features == 0,
        "WITH_TOTAL": with_total,
        "BLOCK_R": launch.block_rows,
        "BLOCK_V": launch.block_vocab,
        "BLOCK_H": launch.block_features,
        "DOT_DTYPE": half if is_rounded else tl.float32,
        "PRECISION": "tf32x3" if has_fast_math else "ieee",
        "FAST": has_fast_math,
    }
    return overlapped(chosen, launch_options(launch), arch)


def reduce_constants(slots: int, arch: str, *, with_total: bool, has_fast_math: bool) -> Constants:
    """Compile-time constants and compiler options of the second stage, for at most `slots` splits.

    The number of splits changes with that of rows; nothing is compiled again for it.
    """
    block = 1 << (slots - 1).bit_length()
    chosen = {
        "WITH_TOTAL": with_total,
        "BLOCK_S": block,
        "BLOCK_R": max(1, min(16, _REDUCE_ENTRIES // block)),
        "FAST": has_fast_math,
    }
    return overlapped(chosen, launch_options(Launch(num_warps=4)), arch)


def num_splits(
    num_rows: int, vocab_size: int, chosen: dict[str, Any], slots: int
) -> tuple[int, int]:
    """Splits of the vocabulary, at most `slots`, and the tokens in each.

    The programs fill one wave of `slots`, or the number of waves that is done soonest. With one
    block of rows reading the weight takes all the time, and splits are cut to 16 tokens.
    """
    row_blocks = -(-num_rows // chosen["BLOCK_R"])
    granule = chosen["BLOCK_V"] if row_blocks > 1 else 16

    def tokens_of(waves: int) -> int:
        tokens = -(-vocab_size // max(1, waves * slots // row_blocks))
        return -(-tokens // granule) * granule

    def time(waves: int) -> int:
        """In tokens that a processor reads; starting a program costs about one block."""
        tokens = tokens_of(waves)
        programs = row_blocks * -(-vocab_size // tokens)
        return -(-programs // slots) * (tokens + granule)

    fewest = -(-row_blocks // slots)
    tokens = tokens_of(min(range(fewest, min(fewest + _MORE_WAVES, row_blocks) + 1), key=time))
    return -(-vocab_size // tokens), tokens


def argmax_setting(num_rows: int, dtype: torch.dtype, arch: str, *, with_total: bool) -> Launch:
    """The table's row for the first stage."""
    form = ".fp32" if dtype == torch.float32 else ".total" if with_total else ""
    return setting(f"linear_argmax{form}", arch, num_rows)


def find_maxima(
    rows: Tensor, weight: Tensor, index: Tensor, largest: Tensor, logsumexp: Tensor,
    *, with_logsumexp: bool,
) -> None:  # fmt: skip
    """Launch both stages; the results ``[R]`` are written to the last three tensors."""
    (num_rows, width), vocab_size = rows.shape, weight.shape[0]
    arch, has_fast_math = architecture(rows.device), use_fast_math()
    chosen, options = constants(
        num_rows, width, rows.dtype, arch, with_total=with_logsumexp, has_fast_math=has_fast_math,
        can_round=not is_interpreted(),
    )  # fmt: skip
    launch = argmax_setting(num_rows, rows.dtype, arch, with_total=with_logsumexp)
    slots = launch.programs_per_processor * num_processors(rows.device)
    splits, tokens = num_splits(num_rows, vocab_size, chosen, slots)
    high, token, total = _partials(rows, splits, with_logsumexp)
    grid = (-(-num_rows // chosen["BLOCK_R"]), splits)
    with torch.cuda.device_of(rows):
        partial_kernel[grid](
            rows, weight, high, token, total, num_rows, vocab_size, tokens, width, *rows.stride(),
            *weight.stride(), **chosen, **options,
        )  # fmt: skip
        chosen, options = reduce_constants(
            slots, arch, with_total=with_logsumexp, has_fast_math=has_fast_math
        )
        reduce_kernel[(-(-num_rows // chosen["BLOCK_R"]),)](
            high, token, total, index, largest, logsumexp, num_rows, splits, **chosen, **options
        )


def _partials(rows: Tensor, splits: int, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, its token and the sum of exponentials of each split and row."""
    shape = (splits, rows.shape[0])
    return (
        rows.new_empty(shape, dtype=torch.float32),
        rows.new_empty(shape, dtype=torch.int32),
        rows.new_empty(shape if with_logsumexp else (0,), dtype=torch.float32),
    )
