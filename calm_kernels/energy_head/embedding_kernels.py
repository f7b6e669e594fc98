"""Noise into the residual stream: draw, embed, LayerNorm, and the LayerNorm of the first block.

Noise is drawn in registers, and drawn again in the backward pass. A program holds BLOCK_ROWS rows
as four slices ``[BLOCK_ROWS, BLOCK_Q]`` of ceil(Z / 4) elements, the outputs of one Philox call of
noise.py, and multiplies each with its columns of the weight. Row ``r`` is draw ``r % num_draws`` of
patch ``r // num_draws``.
"""

import triton
import triton.language as tl

from calm_kernels.energy_head.norm_kernels import norm_gradient, normalize
from calm_kernels.noise_kernels import load_key, philox

__all__ = ["embed_backward_kernel", "embed_kernel"]

_STREAM_HEAD = tl.constexpr(2)  # noise.Stream.HEAD
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def _drawn_slices(
    seed_ptr, first_row_ptr, patch, draw, q, stride_seed, noise_scale, WORDS: tl.constexpr
):
    """Four slices of U[-1/2, 1/2) times `noise_scale`."""
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, patch, stride_seed, _STREAM_HEAD)
    c0 = (draw[:, None] * WORDS + q[None, :]).to(tl.uint32)
    zero = c0 * 0
    words = philox(
        c0, c1[:, None] + zero, c2[:, None] + zero, c3[:, None] + zero, k0[:, None], k1[:, None]
    )
    slices = ()
    for k in tl.static_range(4):
        uniform = (words[k] >> 8).to(tl.float32) * _UNIFORM_STEP
        slices = slices + ((uniform - 0.5) * noise_scale,)
    return slices


@triton.jit
def _noise_slices(
    noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, num_draws, stride_n, stride_r, stride_z,
    stride_seed, noise_scale, IS_GIVEN: tl.constexpr, NOISE_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Noise of the rows in four slices ``[BLOCK_ROWS, BLOCK_Q]``, read or drawn, 0 outside."""
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    safe = tl.minimum(row, num_rows - 1)
    patch, draw = safe // num_draws, safe % num_draws
    if not IS_GIVEN:
        drawn = _drawn_slices(
            seed_ptr, first_row_ptr, patch, draw, q, stride_seed, noise_scale, WORDS
        )
    slices = ()
    for k in tl.static_range(4):
        element = k * WORDS + q
        mask = (row < num_rows)[:, None] & ((q < WORDS) & (element < NOISE_SIZE))[None, :]
        if IS_GIVEN:
            offs = (draw * stride_n + patch * stride_r)[:, None] + element[None, :] * stride_z
            noise = tl.load(noise_ptr + offs, mask=mask, other=0.0)
        else:
            noise = tl.where(mask, drawn[k], 0.0)
        slices = slices + (noise.to(DTYPE),)
    return slices


@triton.jit
def _embedded(
    slices, weight_ptr, bias_ptr, q, NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """noise · weightᵀ + bias as tiles ``[BLOCK_ROWS, CHUNK]``, 0 outside."""
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    tiles = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        tile = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        tile += tl.zeros((slices[0].shape[0], CHUNK), tl.float32)
        for k in tl.static_range(4):
            element = k * WORDS + q
            mask = ((q < WORDS) & (element < NOISE_SIZE))[:, None] & (column < WIDTH)[None, :]
            offs = column[None, :] * NOISE_SIZE + element[:, None]
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)  # [BLOCK_Q, CHUNK]
            tile = tl.dot(
                slices[k].to(DOT_DTYPE), weight.to(DOT_DTYPE), tile, input_precision=PRECISION
            )
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _affine(normal, weight_ptr, shift_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """x̂ · weight + shift, 0 outside."""
    tiles = ()
    for k in tl.static_range(len(normal)):
        column = k * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tiles = tiles + (normal[k] * weight[None, :] + shift[None, :],)
    return tiles


@triton.jit
def _store(pointer, tiles, row, num_rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    for k in tl.static_range(len(tiles)):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        tl.store(pointer + offs, tiles[k].to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_draws"])
def embed_kernel(
    noise_ptr, seed_ptr, first_row_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_shift_ptr,
    next_weight_ptr, next_shift_ptr, stream_ptr, normed_ptr, num_rows, num_draws, stride_n,
    stride_r, stride_z, stride_seed, noise_scale, IS_GIVEN: tl.constexpr,
    NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, NORM_EPS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """stream = LN(weight · noise + bias), normed = LN'(stream)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = tl.arange(0, BLOCK_Q)
    slices = _noise_slices(
        noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, num_draws, stride_n, stride_r,
        stride_z, stride_seed, noise_scale, IS_GIVEN, NOISE_SIZE, weight_ptr.dtype.element_ty,
    )  # fmt: skip
    tiles = _embedded(
        slices, weight_ptr, bias_ptr, q, NOISE_SIZE, WIDTH, CHUNK, NUM_CHUNKS, DOT_DTYPE, PRECISION
    )
    normal, _ = normalize(tiles, WIDTH, CHUNK, NORM_EPS)
    stream = _affine(normal, norm_weight_ptr, norm_shift_ptr, WIDTH, CHUNK)
    _store(stream_ptr, stream, row, num_rows, WIDTH, CHUNK)
    again, _ = normalize(stream, WIDTH, CHUNK, NORM_EPS)
    normed = _affine(again, next_weight_ptr, next_shift_ptr, WIDTH, CHUNK)
    _store(normed_ptr, normed, row, num_rows, WIDTH, CHUNK)


@triton.jit(do_not_specialize=["num_rows", "num_draws", "num_groups"])
def embed_backward_kernel(
    noise_ptr, seed_ptr, first_row_ptr, weight_ptr, bias_ptr, norm_weight_ptr, dstream_ptr,
    dproduct_ptr, drawn_ptr, sums_ptr, num_rows, num_draws, num_groups, stride_n, stride_r,
    stride_z, stride_seed, stride_group, noise_scale, IS_GIVEN: tl.constexpr,
    NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, NORM_EPS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of weight · noise from that of the stream, and the noise again, ``[rows, Z]``, for
    the weight's gradient.

    A group of rows leaves two sums over rows in `sums`: of dstream · x̂ and of the result.
    """
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    group = tl.program_id(0)
    q = tl.arange(0, BLOCK_Q)
    sums_ptr += group.to(tl.int64) * stride_group
    for k in tl.static_range(NUM_CHUNKS):
        column = k * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums_ptr + column, tl.zeros((CHUNK,), tl.float32), mask=column < WIDTH)
        tl.store(sums_ptr + WIDTH + column, tl.zeros((CHUNK,), tl.float32), mask=column < WIDTH)
    tl.debug_barrier()
    for tile in range(group, tl.cdiv(num_rows, BLOCK_ROWS), num_groups):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        slices = _noise_slices(
            noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, num_draws, stride_n, stride_r,
            stride_z, stride_seed, noise_scale, IS_GIVEN, NOISE_SIZE, weight_ptr.dtype.element_ty,
        )  # fmt: skip
        for k in tl.static_range(4):
            element = k * WORDS + q
            mask = (row < num_rows)[:, None] & ((q < WORDS) & (element < NOISE_SIZE))[None, :]
            tl.store(drawn_ptr + row[:, None] * NOISE_SIZE + element[None, :], slices[k], mask=mask)
        tiles = _embedded(
            slices, weight_ptr, bias_ptr, q, NOISE_SIZE, WIDTH, CHUNK, NUM_CHUNKS, DOT_DTYPE,
            PRECISION,
        )  # fmt: skip
        normal, scale = normalize(tiles, WIDTH, CHUNK, NORM_EPS)
        dnormal = _through_weight(
            normal, dstream_ptr, norm_weight_ptr, sums_ptr, row, num_rows, WIDTH, CHUNK
        )
        gradient = norm_gradient(normal, dnormal, scale, WIDTH)
        _store(dproduct_ptr, gradient, row, num_rows, WIDTH, CHUNK)
        _accumulate(sums_ptr + WIDTH, gradient, WIDTH, CHUNK)
        tl.debug_barrier()  # the next tile reads these sums, perhaps in other threads


@triton.jit
def _through_weight(
    normal, dstream_ptr, weight_ptr, sums_ptr, row, num_rows, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """dx̂ = dstream · weight; adds dstream · x̂ to the sums. Rows beyond the last are 0."""
    dnormal = ()
    products = ()
    for k in tl.static_range(len(normal)):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        dstream = tl.load(dstream_ptr + offs, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        dnormal = dnormal + (dstream * weight[None, :],)
        products = products + (dstream * normal[k],)
    _accumulate(sums_ptr, products, WIDTH, CHUNK)
    return dnormal


@triton.jit
def _accumulate(sums_ptr, tiles, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Add sums over rows to a row of memory that no other program touches."""
    for k in tl.static_range(len(tiles)):
        column = k * CHUNK + tl.arange(0, CHUNK)
        before = tl.load(sums_ptr + column, mask=column < WIDTH, other=0.0)
        tl.store(sums_ptr + column, before + tl.sum(tiles[k], axis=0), mask=column < WIDTH)
