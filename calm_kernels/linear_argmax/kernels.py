"""Argmax over the vocabulary in two stages: splits of the vocabulary, then the splits of a row.

A program of `partial_kernel` holds BLOCK_R rows and goes through its split of the vocabulary,
BLOCK_V tokens at a time. It keeps the running maximum, its token and, on request, the running sum
of exponentials. Programs of one split run at the same time, so that its part of the weight is read
from memory once. Everywhere the first of equal entries wins, and NaN counts as larger than any
number.
"""

import triton
import triton.language as tl

from calm_kernels.device import exp2, log2

__all__ = ["partial_kernel", "reduce_kernel"]

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


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, row, token, width, stride_r, stride_rh, stride_v, stride_vh,
    IS_EVEN: tl.constexpr, BLOCK_H: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits ``[BLOCK_R, BLOCK_V]``; rows and tokens count from the pointers, in 32 bits."""
    feature = tl.arange(0, BLOCK_H)
    hidden_offs = row[:, None] * stride_r + feature[None, :] * stride_rh
    weight_offs = token[None, :] * stride_v + feature[:, None] * stride_vh
    logits = tl.zeros([row.shape[0], token.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_H):
        hidden_ptrs = hidden_ptr + start * stride_rh + hidden_offs
        weight_ptrs = weight_ptr + start * stride_vh + weight_offs
        if IS_EVEN:
            rows = tl.load(hidden_ptrs)  # [BLOCK_R, BLOCK_H]
            weight = tl.load(weight_ptrs)  # [BLOCK_H, BLOCK_V]
        else:
            is_feature = feature < width - start
            rows = tl.load(hidden_ptrs, mask=is_feature[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_feature[:, None], other=0.0)
        logits = tl.dot(rows.to(DOT_DTYPE), weight.to(DOT_DTYPE), logits, input_precision=PRECISION)
    return logits


@triton.jit(do_not_specialize=["num_rows", "tokens_per_split"])
def partial_kernel(
    hidden_ptr, weight_ptr, high_ptr, token_ptr, total_ptr, num_rows, vocab_size, tokens_per_split,
    width, stride_r, stride_rh, stride_v, stride_vh, IS_EVEN: tl.constexpr,
    WITH_TOTAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of each row and split: largest logit, its token, Σ exp(logit - largest); ``[splits, R]``."""
    split = tl.program_id(1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    safe = tl.minimum(row, (num_rows - 1 - first_row).to(tl.int32))
    hidden_ptr += first_row * stride_r
    first = split * tokens_per_split
    weight_ptr += first.to(tl.int64) * stride_v
    last = tl.minimum(first + tokens_per_split, vocab_size)
    token = tl.arange(0, BLOCK_V)
    high = tl.full([BLOCK_R], -_INFINITY, tl.float32)
    best = tl.full([BLOCK_R], 0, tl.int32) + first
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_V):
        num_left = last - start
        # Past the end the last token is repeated, which changes nothing: the first of equals wins.
        logits = _logits(
            hidden_ptr, weight_ptr, safe, tl.minimum(token, num_left - 1), width, stride_r,
            stride_rh, stride_v, stride_vh, IS_EVEN, BLOCK_H, DOT_DTYPE, PRECISION,
        )  # fmt: skip
        here = tl.reduce(logits, 1, _larger)
        is_high = (logits == here[:, None]) | (logits != logits)
        where = tl.min(tl.where(is_high, token[None, :], _NO_TOKEN), axis=1) + start
        wins = (here > high) | ((here != here) & (high == high))
        raised = tl.where(wins, here, high)
        if WITH_TOTAL:
            terms = exp2((logits - _finite(raised)[:, None]) * _LOG2_E, FAST)
            terms = tl.where((token < num_left)[None, :], terms, 0.0)
            total = _rescaled(total, high, raised, FAST) + tl.sum(terms, axis=1)
        high = raised
        best = tl.where(wins, where, best)
        weight_ptr += BLOCK_V * stride_v
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
):  # fmt: skip
    """The splits of each row to its index, largest logit and log-sum-exp, ``[R]``."""
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
