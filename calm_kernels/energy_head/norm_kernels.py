"""Residual sum and LayerNorm in one pass each way; statistics and the residual stream in float32.

A program has whole rows in registers, as `NUM_CHUNKS` tiles ``[BLOCK_ROWS, CHUNK]``: widths that
are no power of two waste no lanes. Statistics are computed again in the backward pass, because the
row is there anyway.
"""

import triton
import triton.language as tl

__all__ = ["norm_backward_kernel", "norm_kernel", "normalize"]


@triton.jit
def _row_sum(tiles):
    """Sum over all features, ``[BLOCK_ROWS]``."""
    total = tiles[0]
    for k in tl.static_range(1, len(tiles)):
        total += tiles[k]
    return tl.sum(total, axis=1)


@triton.jit
def normalize(tiles, WIDTH: tl.constexpr, CHUNK: tl.constexpr, NORM_EPS: tl.constexpr):
    """(x - mean) / √(variance + NORM_EPS) in place of x, and the reciprocal of that root.

    Features beyond WIDTH must be 0 and stay so.
    """
    mean = _row_sum(tiles) / WIDTH
    centred = ()
    squares = ()
    for k in tl.static_range(len(tiles)):
        inside = (k * CHUNK + tl.arange(0, CHUNK) < WIDTH)[None, :]
        difference = tl.where(inside, tiles[k] - mean[:, None], 0.0)
        centred = centred + (difference,)
        squares = squares + (difference * difference,)
    scale = tl.rsqrt(_row_sum(squares) / WIDTH + NORM_EPS)
    normal = ()
    for k in tl.static_range(len(tiles)):
        normal = normal + (centred[k] * scale[:, None],)
    return normal, scale


@triton.jit
def _load_rows(
    pointer, row, num_rows, WIDTH: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr
):
    """Tiles ``[BLOCK_ROWS, CHUNK]`` as they are in memory, 0 outside."""
    tiles = ()
    for k in tl.static_range(NUM_CHUNKS):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        tiles = tiles + (tl.load(pointer + row[:, None] * WIDTH + column[None, :], mask, 0.0),)
    return tiles


@triton.jit
def _source(
    step_ptr, bias_ptr, stream_ptr, row, num_rows, HAS_STEP: tl.constexpr,
    HAS_STREAM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr,
):  # fmt: skip
    """x = stream + step + bias, those of them that are there, as tiles ``[BLOCK_ROWS, CHUNK]``."""
    tiles = ()
    for k in tl.static_range(NUM_CHUNKS):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        if HAS_STREAM:
            tile = tl.load(stream_ptr + offs, mask=mask, other=0.0)
        else:
            tile = tl.zeros(mask.shape, tl.float32)
        if HAS_STEP:
            bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            tile += tl.load(step_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        tiles = tiles + (tile,)
    return tiles


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    step_ptr, bias_ptr, stream_ptr, next_ptr, weight_ptr, shift_ptr, normed_ptr, num_rows,
    HAS_STEP: tl.constexpr, HAS_STREAM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """next = stream + (step + bias), normed = LN(next); rows ``[WIDTH]``, `next` in float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tiles = _source(
        step_ptr, bias_ptr, stream_ptr, row, num_rows, HAS_STEP, HAS_STREAM, WIDTH, CHUNK,
        NUM_CHUNKS,
    )  # fmt: skip
    normal, _ = normalize(tiles, WIDTH, CHUNK, NORM_EPS)
    for k in tl.static_range(NUM_CHUNKS):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        if HAS_STEP and HAS_STREAM:
            tl.store(next_ptr + offs, tiles[k], mask=mask)
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        normed = normal[k] * weight[None, :] + shift[None, :]
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_gradient(normal, dnormal, scale, WIDTH: tl.constexpr):
    """dx of x̂ = normalize(x): (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) · scale.

    Features beyond WIDTH are 0 in both arguments, and of no meaning in the result.
    """
    products = ()
    for k in tl.static_range(len(normal)):
        products = products + (dnormal[k] * normal[k],)
    mean = (_row_sum(dnormal) / WIDTH)[:, None]
    slope = (_row_sum(products) / WIDTH)[:, None]
    gradient = ()
    for k in tl.static_range(len(normal)):
        gradient = gradient + ((dnormal[k] - mean - normal[k] * slope) * scale[:, None],)
    return gradient


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def norm_backward_kernel(
    step_ptr, bias_ptr, stream_ptr, weight_ptr, shift_ptr, dnormed_ptr, upstream_ptr, dsource_ptr,
    normed_ptr, sums_ptr, num_rows, num_groups, stride_group, HAS_STREAM: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """dx = dLN(dnormed) + upstream, and LN(x) again for the gradient of the weights that took it;
    dx may be dnormed.

    x is the stream, or step + bias without one. A group of rows leaves its sums over rows in
    `sums`, three rows: of dnormed · x̂, of dnormed, of dx.
    """
    group = tl.program_id(0)
    sums_weight = ()
    sums_shift = ()
    sums_source = ()
    for _ in tl.static_range(NUM_CHUNKS):
        zero = tl.zeros((BLOCK_ROWS, CHUNK), tl.float32)
        sums_weight = sums_weight + (zero,)
        sums_shift = sums_shift + (zero,)
        sums_source = sums_source + (zero,)
    for tile in range(group, tl.cdiv(num_rows, BLOCK_ROWS), num_groups):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        tiles = _source(
            step_ptr, bias_ptr, stream_ptr, row, num_rows, not HAS_STREAM, HAS_STREAM, WIDTH,
            CHUNK, NUM_CHUNKS,
        )  # fmt: skip
        # Before the statistics, so that the program waits for memory once.
        dnormed = _load_rows(dnormed_ptr, row, num_rows, WIDTH, CHUNK, NUM_CHUNKS)
        if HAS_UPSTREAM:
            upstream = _load_rows(upstream_ptr, row, num_rows, WIDTH, CHUNK, NUM_CHUNKS)
        normal, scale = normalize(tiles, WIDTH, CHUNK, NORM_EPS)
        dnormal, sums_weight, sums_shift = _through_affine(
            normal, dnormed, weight_ptr, shift_ptr, normed_ptr, sums_weight, sums_shift, row,
            num_rows, WIDTH, CHUNK,
        )  # fmt: skip
        gradient = _norm_gradient(normal, dnormal, scale, WIDTH)
        added = ()
        for k in tl.static_range(NUM_CHUNKS):
            column = k * CHUNK + tl.arange(0, CHUNK)
            mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
            offs = row[:, None] * WIDTH + column[None, :]
            dx = gradient[k]
            if HAS_UPSTREAM:
                dx += upstream[k].to(tl.float32)
            tl.store(dsource_ptr + offs, dx.to(dsource_ptr.dtype.element_ty), mask=mask)
            added = added + (sums_source[k] + tl.where(mask, dx, 0.0),)
        sums_source = added
    for k in tl.static_range(NUM_CHUNKS):
        column = k * CHUNK + tl.arange(0, CHUNK)
        place = sums_ptr + group.to(tl.int64) * stride_group + column
        inside = column < WIDTH
        tl.store(place, tl.sum(sums_weight[k], axis=0), mask=inside)
        tl.store(place + WIDTH, tl.sum(sums_shift[k], axis=0), mask=inside)
        tl.store(place + 2 * WIDTH, tl.sum(sums_source[k], axis=0), mask=inside)


@triton.jit
def _through_affine(
    normal, dnormed, weight_ptr, shift_ptr, normed_ptr, sums_weight, sums_shift, row, num_rows,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store x̂ · weight + shift; dx̂, and both sums with this tile added."""
    dnormal = ()
    added_weight = ()
    added_shift = ()
    for k in tl.static_range(len(normal)):
        column = k * CHUNK + tl.arange(0, CHUNK)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        normed = normal[k] * weight[None, :] + shift[None, :]
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        gradient = dnormed[k].to(tl.float32)
        dnormal = dnormal + (gradient * weight[None, :],)
        added_weight = added_weight + (sums_weight[k] + gradient * normal[k],)
        added_shift = added_shift + (sums_shift[k] + gradient,)
    return dnormal, added_weight, added_shift
