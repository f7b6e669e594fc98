"""Residual sum and LayerNorm in one kernel each way; statistics and the residual stream in float32.

A program has whole rows in registers, as `NUM_SEGMENTS` tiles ``[BLOCK_ROWS, SEGMENT]``, so that
widths other than powers of two waste no lanes. The backward kernel has the row anyway and computes
its statistics again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.energy_head.parameters import NORM_EPS, Pair
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting

__all__ = [
    "embedding_norm_constants",
    "embedding_norms",
    "embedding_norms_kernel",
    "layer_norm",
    "layer_norm_backward",
    "norm_backward_kernel",
    "norm_constants",
    "norm_kernel",
    "row_segments",
]


@triton.jit
def _row_sum(tiles):
    """Sum over all features, ``[BLOCK_ROWS]``."""
    total = tiles[0]
    for k in tl.static_range(1, len(tiles)):
        total += tiles[k]
    return tl.sum(total, axis=1)


@triton.jit
def _normalize(tiles, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, NORM_EPS: tl.constexpr):
    """(x - mean) / √(variance + NORM_EPS) in place of x, and the reciprocal of that root.

    Features beyond WIDTH must be 0 and stay so.
    """
    mean = _row_sum(tiles) / WIDTH
    centred = ()
    squares = ()
    for k in tl.static_range(len(tiles)):
        inside = (k * SEGMENT + tl.arange(0, SEGMENT) < WIDTH)[None, :]
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
    pointer, row, num_rows, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, NUM_SEGMENTS: tl.constexpr
):
    """Tiles ``[BLOCK_ROWS, SEGMENT]`` as they are in memory, 0 outside."""
    tiles = ()
    for k in tl.static_range(NUM_SEGMENTS):
        column = k * SEGMENT + tl.arange(0, SEGMENT)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        tiles = tiles + (tl.load(pointer + row[:, None] * WIDTH + column[None, :], mask, 0.0),)
    return tiles


@triton.jit
def _source(
    step_ptr, bias_ptr, stream_ptr, row, num_rows, HAS_STEP: tl.constexpr,
    HAS_STREAM: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """x = stream + step + bias, of those that are given, as tiles ``[BLOCK_ROWS, SEGMENT]``."""
    tiles = ()
    for k in tl.static_range(NUM_SEGMENTS):
        column = k * SEGMENT + tl.arange(0, SEGMENT)
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
    HAS_STEP: tl.constexpr, HAS_STREAM: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """next = stream + (step + bias), normed = LN(next); rows ``[WIDTH]``, `next` in float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tiles = _source(
        step_ptr, bias_ptr, stream_ptr, row, num_rows, HAS_STEP, HAS_STREAM, WIDTH, SEGMENT,
        NUM_SEGMENTS,
    )  # fmt: skip
    if HAS_STEP and HAS_STREAM:
        for k in tl.static_range(NUM_SEGMENTS):
            column = k * SEGMENT + tl.arange(0, SEGMENT)
            mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
            tl.store(next_ptr + row[:, None] * WIDTH + column[None, :], tiles[k], mask=mask)
    normal, _ = _normalize(tiles, WIDTH, SEGMENT, NORM_EPS)
    _store_affine(normed_ptr, normal, weight_ptr, shift_ptr, row, num_rows, WIDTH, SEGMENT)


@triton.jit
def _store_affine(
    out_ptr, normal, weight_ptr, shift_ptr, row, num_rows, WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Store x̂ · weight + shift; the same as tiles, 0 beyond WIDTH."""
    tiles = ()
    for k in tl.static_range(len(normal)):
        column = k * SEGMENT + tl.arange(0, SEGMENT)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tile = normal[k] * weight[None, :] + shift[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        tl.store(out_ptr + offs, tile.to(out_ptr.dtype.element_ty), mask=mask)
        tiles = tiles + (tile,)
    return tiles


@triton.jit(do_not_specialize=["num_positions", "num_rows"])
def embedding_norms_kernel(
    embedded_ptr, norm_weight_ptr, norm_shift_ptr, condition_ptr, stream_ptr, noise_weight_ptr,
    noise_shift_ptr, next_weight_ptr, next_shift_ptr, normed_ptr, num_positions, num_rows,
    WIDTH: tl.constexpr, SEGMENT: tl.constexpr, NUM_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, NORM_EPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """condition = LN(embedded) in the first programs; in the others stream = LN'(stream) in place
    and normed = LN''(stream).
    """
    wait_for_previous(OVERLAP)
    block = tl.program_id(0)
    num_blocks = tl.cdiv(num_positions, BLOCK_ROWS)
    if block < num_blocks:
        row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tiles = _load_rows(embedded_ptr, row, num_positions, WIDTH, SEGMENT, NUM_SEGMENTS)
        normal, _ = _normalize(tiles, WIDTH, SEGMENT, NORM_EPS)
        _store_affine(
            condition_ptr, normal, norm_weight_ptr, norm_shift_ptr, row, num_positions, WIDTH,
            SEGMENT,
        )  # fmt: skip
    else:
        row = (block - num_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tiles = _load_rows(stream_ptr, row, num_rows, WIDTH, SEGMENT, NUM_SEGMENTS)
        normal, _ = _normalize(tiles, WIDTH, SEGMENT, NORM_EPS)
        tiles = _store_affine(
            stream_ptr, normal, noise_weight_ptr, noise_shift_ptr, row, num_rows, WIDTH, SEGMENT
        )
        normal, _ = _normalize(tiles, WIDTH, SEGMENT, NORM_EPS)
        _store_affine(
            normed_ptr, normal, next_weight_ptr, next_shift_ptr, row, num_rows, WIDTH, SEGMENT
        )


@triton.jit
def _norm_gradient(normal, dnormal, scale, WIDTH: tl.constexpr):
    """dx of x̂ = _normalize(x): (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) · scale.

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
    HAS_UPSTREAM: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, NORM_EPS: tl.constexpr,
):  # fmt: skip
    """dx = dLN(dnormed) + upstream; and LN(x) again, for the gradient of the weight it is
    multiplied with.

    x is the stream, or step + bias without one. Each group of rows writes three sums over rows to
    `sums`: of dnormed · x̂, of dnormed and of dx.
    """
    group = tl.program_id(0)
    sums_weight = ()
    sums_shift = ()
    sums_source = ()
    for _ in tl.static_range(NUM_SEGMENTS):
        zero = tl.zeros((BLOCK_ROWS, SEGMENT), tl.float32)
        sums_weight = sums_weight + (zero,)
        sums_shift = sums_shift + (zero,)
        sums_source = sums_source + (zero,)
    for tile in range(group, tl.cdiv(num_rows, BLOCK_ROWS), num_groups):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        tiles = _source(
            step_ptr, bias_ptr, stream_ptr, row, num_rows, not HAS_STREAM, HAS_STREAM, WIDTH,
            SEGMENT, NUM_SEGMENTS,
        )  # fmt: skip
        # Before the statistics, so that the program waits for memory once.
        dnormed = _load_rows(dnormed_ptr, row, num_rows, WIDTH, SEGMENT, NUM_SEGMENTS)
        if HAS_UPSTREAM:
            upstream = _load_rows(upstream_ptr, row, num_rows, WIDTH, SEGMENT, NUM_SEGMENTS)
        normal, scale = _normalize(tiles, WIDTH, SEGMENT, NORM_EPS)
        dnormal, sums_weight, sums_shift = _affine_backward(
            normal, dnormed, weight_ptr, shift_ptr, normed_ptr, sums_weight, sums_shift, row,
            num_rows, WIDTH, SEGMENT,
        )  # fmt: skip
        gradient = _norm_gradient(normal, dnormal, scale, WIDTH)
        added = ()
        for k in tl.static_range(NUM_SEGMENTS):
            column = k * SEGMENT + tl.arange(0, SEGMENT)
            mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
            offs = row[:, None] * WIDTH + column[None, :]
            dx = gradient[k]
            if HAS_UPSTREAM:
                dx += upstream[k].to(tl.float32)
            tl.store(dsource_ptr + offs, dx.to(dsource_ptr.dtype.element_ty), mask=mask)
            added = added + (sums_source[k] + tl.where(mask, dx, 0.0),)
        sums_source = added
    for k in tl.static_range(NUM_SEGMENTS):
        column = k * SEGMENT + tl.arange(0, SEGMENT)
        place = sums_ptr + group.to(tl.int64) * stride_group + column
        inside = column < WIDTH
        tl.store(place, tl.sum(sums_weight[k], axis=0), mask=inside)
        tl.store(place + WIDTH, tl.sum(sums_shift[k], axis=0), mask=inside)
        tl.store(place + 2 * WIDTH, tl.sum(sums_source[k], axis=0), mask=inside)


@triton.jit
def _affine_backward(
    normal, dnormed, weight_ptr, shift_ptr, normed_ptr, sums_weight, sums_shift, row, num_rows,
    WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Store x̂ · weight + shift; dx̂, and both sums with this tile added."""
    dnormal = ()
    added_weight = ()
    added_shift = ()
    for k in tl.static_range(len(normal)):
        column = k * SEGMENT + tl.arange(0, SEGMENT)
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


def row_segments(width: int, largest: int) -> dict[str, int]:
    """Segments of a row: a power of two that divides `width`, if one of 64 or more does."""
    divisor = width & -width
    block = 1 << (width - 1).bit_length()
    segment = min(largest, divisor if divisor >= 64 else block)
    return {"WIDTH": width, "SEGMENT": segment, "NUM_SEGMENTS": -(-width // segment)}


def norm_constants(width: int, arch: str, *, is_backward: bool) -> Constants:
    """Of `norm_kernel` or `norm_backward_kernel`, flags apart."""
    launch = setting("energy_head.norm" + ".backward" * is_backward, arch, width)
    constants = row_segments(width, 1024) | {"BLOCK_ROWS": launch.block_rows, "NORM_EPS": NORM_EPS}
    return constants, launch_options(launch)


def embedding_norm_constants(width: int, arch: str) -> Constants:
    """Of `embedding_norms_kernel`."""
    return overlapped(*norm_constants(width, arch, is_backward=False), arch)


def _constants(tensor: Tensor, *, is_backward: bool) -> Constants:
    return norm_constants(tensor.shape[-1], architecture(tensor.device), is_backward=is_backward)


def layer_norm(
    step: Tensor | None, bias: Tensor | None, stream: Tensor | None, norm: Pair,
    *, out: Tensor | None = None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """LN(stream + step + bias), of those that are given; the sum goes to `out`."""
    source = stream if step is None else step
    assert source is not None
    normed = torch.empty_like(source, dtype=dtype)
    constants, options = _constants(source, is_backward=False)
    norm_kernel[(-(-len(source) // constants["BLOCK_ROWS"]),)](
        source, norm.bias if bias is None else bias, source if stream is None else stream,
        source if out is None else out, *norm, normed, len(source), HAS_STEP=step is not None,
        HAS_STREAM=stream is not None, **constants, **options,
    )  # fmt: skip
    return normed


def embedding_norms(
    embedded: Tensor, stream: Tensor, norm_hidden: Pair, norm_noise: Pair, next_norm: Pair,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """LN(embedded) and LN''(LN'(stream)); LN'(stream) takes the place of the stream."""
    condition = torch.empty_like(embedded, dtype=dtype)
    normed = torch.empty_like(stream, dtype=dtype)
    constants, options = embedding_norm_constants(stream.shape[-1], architecture(stream.device))
    blocks = sum(-(-len(rows) // constants["BLOCK_ROWS"]) for rows in (embedded, stream))
    embedding_norms_kernel[(blocks,)](
        embedded, *norm_hidden, condition, stream, *norm_noise, *next_norm, normed, len(embedded),
        len(stream), **constants, **options,
    )  # fmt: skip
    return condition, normed


def layer_norm_backward(
    dnormed: Tensor, source: Tensor, bias: Tensor | None, norm: Pair, sums: Tensor,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the source and its LayerNorm again, in the dtype of `dnormed`.

    Fills three vectors of `sums`. The source is a matmul with a bias, or a
    float32 stream without one; `upstream` is added.
    """
    # Not in place: of few features several threads hold the same one, and add it to the sums.
    dsource, normed = torch.empty_like(dnormed), torch.empty_like(dnormed)
    constants, options = _constants(source, is_backward=True)
    norm_backward_kernel[(len(sums),)](
        source, norm.bias if bias is None else bias, source, *norm, dnormed,
        dnormed if upstream is None else upstream, dsource, normed, sums, len(source), len(sums),
        sums.stride(0), HAS_STREAM=bias is None, HAS_UPSTREAM=upstream is not None, **constants,
        **options,
    )  # fmt: skip
    return dsource, normed
