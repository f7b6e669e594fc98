"""Layers of the head for few rows: a product with all that stands before and after it.

A program multiplies BLOCK_R rows with the weights of BLOCK_C features, whole: no sum is split
among programs. The LayerNorm of the residual stream is taken while rows are loaded, from the mean
and the squared deviations that the layer before left of every tile of its features, which are
combined after Chan. What is added to a product is loaded before it, so that nobody waits for it.

Rows and weights past the end repeat the last one; offsets fit into 32 bits.
"""

import triton
import triton.language as tl

from calm_kernels.device import exp2, reciprocal

__all__ = ["residual_layer_kernel", "silu_layer_kernel", "swiglu_layer_kernel"]

_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _silu(x, FAST: tl.constexpr):
    return x * reciprocal(1.0 + exp2(x * _MINUS_LOG2_E, FAST))


@triton.jit
def _place(num_rows, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows (past the end the last one) and features of this program, and where it may write."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    return tl.minimum(row, num_rows - 1), column, mask


@triton.jit
def _tiles(
    parts_ptr, row, num_rows, first, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A part of each row's tiles, ``[BLOCK_R, BLOCK_T]``, and how many features they have."""
    tile = first + tl.arange(0, BLOCK_T)
    count = tl.maximum(tl.minimum(WIDTH - tile * TILE, TILE), 0)[None, :]
    offs = tile[None, :] * num_rows + row[:, None]
    return tl.load(parts_ptr + offs, mask=count > 0, other=0.0), count.to(tl.float32)


@triton.jit
def _statistics(
    parts_ptr, row, num_rows, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
    NORM_EPS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / √(variance + NORM_EPS) of the rows from their tiles' parts, ``[BLOCK_R, 1]``."""
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    total = tl.zeros([row.shape[0]], tl.float32)
    for first in tl.static_range(0, TILES, BLOCK_T):
        means, count = _tiles(parts_ptr, row, num_rows, first, WIDTH, TILE, BLOCK_T)
        total += tl.sum(means * count, axis=1)
    mean = total[:, None] / WIDTH
    square = tl.zeros([row.shape[0]], tl.float32)
    spreads_ptr = parts_ptr + TILES * num_rows
    for first in tl.static_range(0, TILES, BLOCK_T):
        means, count = _tiles(parts_ptr, row, num_rows, first, WIDTH, TILE, BLOCK_T)
        spreads, _ = _tiles(spreads_ptr, row, num_rows, first, WIDTH, TILE, BLOCK_T)
        square += tl.sum(spreads + count * (means - mean) * (means - mean), axis=1)
    return mean, tl.rsqrt(square[:, None] / WIDTH + NORM_EPS)


@triton.jit
def _product(
    rows_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, row, word, mean, scale, stride_word,
    HAS_NORM: tl.constexpr, WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight[word] · x with x the row or its LayerNorm, ``[BLOCK_R, words]``."""
    feature = tl.arange(0, BLOCK_K)
    row_ptrs = rows_ptr + row[:, None] * WIDTH + feature[None, :]
    word_ptrs = weight_ptr + word[None, :] * stride_word + feature[:, None]
    product = tl.zeros([row.shape[0], word.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inside = feature < WIDTH - start
        if IS_EVEN:
            rows = tl.load(row_ptrs + start)  # [BLOCK_R, BLOCK_K]
            words = tl.load(word_ptrs + start)  # [BLOCK_K, words]
        else:
            rows = tl.load(row_ptrs + start, mask=inside[None, :], other=0.0)
            words = tl.load(word_ptrs + start, mask=inside[:, None], other=0.0)
        if HAS_NORM:
            factor = tl.load(norm_weight_ptr + start + feature, mask=inside, other=0.0)
            shift = tl.load(norm_shift_ptr + start + feature, mask=inside, other=0.0)
            normal = rows * scale - mean * scale
            rows = normal * factor.to(tl.float32)[None, :] + shift.to(tl.float32)[None, :]
            rows = rows.to(weight_ptr.dtype.element_ty)
        product = tl.dot(
            rows.to(DOT_DTYPE), words.to(DOT_DTYPE), product, input_precision=PRECISION
        )
    return product


@triton.jit(do_not_specialize=["num_rows", "num_draws"])
def silu_layer_kernel(
    rows_ptr, parts_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, bias_ptr, context_ptr,
    out_ptr, num_rows, num_draws, stride_word, HAS_NORM: tl.constexpr, HAS_CONTEXT: tl.constexpr,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr, NORM_EPS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(weight · x + bias + context[row // num_draws]), x = rows or LN(rows)."""
    row, column, mask = _place(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    shift = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if HAS_CONTEXT:
        offs_context = (row // num_draws)[:, None] * WIDTH + column[None, :]
        shift += tl.load(context_ptr + offs_context, mask=mask, other=0.0).to(tl.float32)
    mean, scale = 0.0, 1.0
    if HAS_NORM:
        mean, scale = _statistics(parts_ptr, row, num_rows, WIDTH, TILE, BLOCK_T, NORM_EPS)
    product = _product(
        rows_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, row, tl.minimum(column, WIDTH - 1),
        mean, scale, stride_word, HAS_NORM, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    value = _silu(product + shift, FAST).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_layer_kernel(
    rows_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, stride_word, WIDTH: tl.constexpr,
    IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(gate) · up with [gate; up] = weight · rows + bias, ``[2 WIDTH, WIDTH]``.

    One product whose columns are gate and up in turn: a thread has both.
    """
    row, column, mask = _place(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    index = tl.arange(0, 2 * BLOCK_C)
    word = tl.minimum(tl.program_id(1) * BLOCK_C + index // 2, WIDTH - 1) + (index % 2) * WIDTH
    bias = tl.load(bias_ptr + word).to(tl.float32)[None, :]
    product = _product(
        rows_ptr, bias_ptr, bias_ptr, weight_ptr, row, word, 0.0, 1.0, stride_word, False, WIDTH,
        IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(product + bias, (BLOCK_R, BLOCK_C, 2)))
    value = (_silu(gate, FAST) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def residual_layer_kernel(
    rows_ptr, weight_ptr, bias_ptr, stream_ptr, parts_ptr, num_rows, stride_word,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """stream += weight · rows + bias in float32, and of each tile's row its mean and the sum of
    squared deviations from it: parts ``[2, tiles, rows]``.
    """
    TILES: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    row, column, mask = _place(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    stream_ptrs = stream_ptr + row[:, None] * WIDTH + column[None, :]
    stream = tl.load(stream_ptrs, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    product = _product(
        rows_ptr, bias_ptr, bias_ptr, weight_ptr, row, tl.minimum(column, WIDTH - 1), 0.0, 1.0,
        stride_word, False, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    stream = tl.where(mask, stream + (product + bias), 0.0)
    tl.store(stream_ptrs, stream, mask=mask)
    tile = tl.program_id(1)
    mean = tl.sum(stream, axis=1) / tl.minimum(WIDTH - tile * BLOCK_C, BLOCK_C)
    difference = tl.where(mask, stream - mean[:, None], 0.0)
    spread = tl.sum(difference * difference, axis=1)
    own = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tile * num_rows + own
    tl.store(parts_ptr + offs, mean, mask=own < num_rows)
    tl.store(parts_ptr + TILES * num_rows + offs, spread, mask=own < num_rows)
