"""Noise into the residual stream: draw, embed, LayerNorm, and the LayerNorm of the first block.

Noise is drawn in registers, and drawn again in the backward pass. A program holds BLOCK_ROWS rows
as four slices ``[BLOCK_ROWS, BLOCK_Q]`` of ceil(Z / 4) elements, the outputs of one Philox call of
noise.py, and multiplies each with its columns of the weight. The matmul is so short that every pass
over the features, SEGMENT at a time, computes it again: for the statistics of the first LayerNorm,
for those of the second, and to store. Row ``r`` is draw ``r % num_draws`` of position
``r // num_draws``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.energy_head.norm_kernels import row_segments
from calm_kernels.energy_head.parameters import NORM_EPS, Pair
from calm_kernels.matmul_kernels import DOT_DTYPES
from calm_kernels.noise_kernels import load_key, philox
from calm_kernels.tuning import (
    Constants,
    architecture,
    launch_options,
    setting,
    use_fast_math,
)

__all__ = [
    "Noise",
    "embed_backward_kernel",
    "embed_kernel",
    "embed_noise",
    "embed_noise_backward",
    "embedded_noise",
    "embedding_constants",
    "noise_constants",
    "noise_slices",
]

_STREAM_HEAD = tl.constexpr(2)  # noise.Stream.HEAD
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def _drawn_slices(
    seed_ptr, first_row, position, draw, q, stride_seed, noise_scale, WORDS: tl.constexpr
):
    """Four slices of U[-1/2, 1/2) times `noise_scale`."""
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row, position, stride_seed, _STREAM_HEAD)
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
def noise_slices(
    noise_ptr, seed_ptr, first_row, row, q, num_rows, num_draws, stride_n, stride_r, stride_z,
    stride_seed, noise_scale, IS_GIVEN: tl.constexpr, NOISE_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Noise of the rows in four slices ``[BLOCK_ROWS, BLOCK_Q]``, read or drawn, 0 outside."""
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    safe = tl.minimum(row, num_rows - 1).to(tl.int32)  # a division of 64 bits is slow
    position = (safe // num_draws).to(tl.int64)
    draw = (safe % num_draws).to(tl.int64)
    if not IS_GIVEN:
        drawn = _drawn_slices(
            seed_ptr, first_row, position, draw, q, stride_seed, noise_scale, WORDS
        )
    slices = ()
    for k in tl.static_range(4):
        element = k * WORDS + q
        mask = (row < num_rows)[:, None] & ((q < WORDS) & (element < NOISE_SIZE))[None, :]
        if IS_GIVEN:
            offs = (draw * stride_n + position * stride_r)[:, None] + element[None, :] * stride_z
            noise = tl.load(noise_ptr + offs, mask=mask, other=0.0)
        else:
            noise = tl.where(mask, drawn[k], 0.0)
        slices = slices + (noise.to(DTYPE),)
    return slices


@triton.jit
def embedded_noise(
    slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """noise · weightᵀ + bias at these columns, ``[BLOCK_ROWS, SEGMENT]``."""
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tile = tl.zeros((slices[0].shape[0], column.shape[0]), tl.float32) + bias[None, :]
    for k in tl.static_range(4):
        element = k * WORDS + q
        mask = ((q < WORDS) & (element < NOISE_SIZE))[:, None] & (column < WIDTH)[None, :]
        offs = column[None, :] * NOISE_SIZE + element[:, None]
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)  # [BLOCK_Q, SEGMENT]
        tile = tl.dot(
            slices[k].to(DOT_DTYPE), weight.to(DOT_DTYPE), tile, input_precision=PRECISION
        )
    return tile


@triton.jit
def _gather(tile, segment, column, mean, spread, WIDTH: tl.constexpr):
    """Mean and squared deviations of each lane with one more segment."""
    difference = tl.where((column < WIDTH)[None, :], tile - mean, 0.0)
    mean += difference / (segment + 1)
    return mean, spread + difference * (tile - mean)


@triton.jit
def _statistics(mean, spread, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, NORM_EPS: tl.constexpr):
    """Mean and 1 / √(variance + NORM_EPS) of the rows, ``[BLOCK_ROWS, 1]``, from those of lanes."""
    segments = (WIDTH + SEGMENT - 1 - tl.arange(0, SEGMENT)) // SEGMENT  # that reach this lane
    count = segments.to(tl.float32)[None, :]
    total = tl.sum(mean * count, axis=1)[:, None] / WIDTH
    variance = tl.sum(spread + count * (mean - total) * (mean - total), axis=1)[:, None] / WIDTH
    return total, tl.rsqrt(variance + NORM_EPS)


@triton.jit
def _embedded_statistics(
    slices, weight_ptr, bias_ptr, q, num_segments, NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr, NORM_EPS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_statistics` of the embedded noise."""
    lane_mean = tl.zeros((slices[0].shape[0], SEGMENT), tl.float32)
    lane_spread = tl.zeros((slices[0].shape[0], SEGMENT), tl.float32)
    for segment in range(num_segments):
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        tile = embedded_noise(
            slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE, PRECISION
        )
        lane_mean, lane_spread = _gather(tile, segment, column, lane_mean, lane_spread, WIDTH)
    return _statistics(lane_mean, lane_spread, WIDTH, SEGMENT, NORM_EPS)


@triton.jit
def _affine(normal, weight_ptr, shift_ptr, column, WIDTH: tl.constexpr):
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return normal * weight[None, :] + shift[None, :]


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_draws", "num_segments"])
def embed_kernel(
    noise_ptr, seed_ptr, first_row, weight_ptr, bias_ptr, norm_weight_ptr, norm_shift_ptr,
    next_weight_ptr, next_shift_ptr, stream_ptr, normed_ptr, num_rows, num_draws, num_segments,
    stride_n, stride_r, stride_z, stride_seed, noise_scale, IS_GIVEN: tl.constexpr,
    NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, NORM_EPS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """stream = LN(weight · noise + bias), normed = LN'(stream)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = tl.arange(0, BLOCK_Q)
    slices = noise_slices(
        noise_ptr, seed_ptr, first_row, row, q, num_rows, num_draws, stride_n, stride_r,
        stride_z, stride_seed, noise_scale, IS_GIVEN, NOISE_SIZE, weight_ptr.dtype.element_ty,
    )  # fmt: skip
    mean, scale = _embedded_statistics(
        slices, weight_ptr, bias_ptr, q, num_segments, NOISE_SIZE, WIDTH, SEGMENT, NORM_EPS,
        DOT_DTYPE, PRECISION,
    )  # fmt: skip
    lane_mean = tl.zeros((BLOCK_ROWS, SEGMENT), tl.float32)
    lane_spread = tl.zeros((BLOCK_ROWS, SEGMENT), tl.float32)
    for segment in range(num_segments):
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        tile = embedded_noise(
            slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE, PRECISION
        )
        stream = _affine((tile - mean) * scale, norm_weight_ptr, norm_shift_ptr, column, WIDTH)
        lane_mean, lane_spread = _gather(stream, segment, column, lane_mean, lane_spread, WIDTH)
    next_mean, next_scale = _statistics(lane_mean, lane_spread, WIDTH, SEGMENT, NORM_EPS)
    for segment in range(num_segments):
        column = segment * SEGMENT + tl.arange(0, SEGMENT)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        tile = embedded_noise(
            slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE, PRECISION
        )
        stream = _affine((tile - mean) * scale, norm_weight_ptr, norm_shift_ptr, column, WIDTH)
        tl.store(stream_ptr + offs, stream, mask=mask)
        normal = (stream - next_mean) * next_scale
        normed = _affine(normal, next_weight_ptr, next_shift_ptr, column, WIDTH)
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_draws", "num_groups", "num_segments"])
def embed_backward_kernel(
    noise_ptr, seed_ptr, first_row, weight_ptr, bias_ptr, norm_weight_ptr, dstream_ptr,
    dmatmul_ptr, drawn_ptr, sums_ptr, num_rows, num_draws, num_groups, num_segments, stride_n,
    stride_r, stride_z, stride_seed, stride_group, noise_scale, IS_GIVEN: tl.constexpr,
    NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, NORM_EPS: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of weight · noise from that of the stream; and the noise ``[rows, Z]`` again, for
    the weight's gradient.

    Each group of rows adds two sums over rows to `sums`: of dstream · x̂ and of the result.
    """
    group = tl.program_id(0)
    q = tl.arange(0, BLOCK_Q)
    sums_ptr += group.to(tl.int64) * stride_group
    for tile_index in range(group, tl.cdiv(num_rows, BLOCK_ROWS), num_groups):
        row = (tile_index * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        slices = noise_slices(
            noise_ptr, seed_ptr, first_row, row, q, num_rows, num_draws, stride_n, stride_r,
            stride_z, stride_seed, noise_scale, IS_GIVEN, NOISE_SIZE, weight_ptr.dtype.element_ty,
        )  # fmt: skip
        _store_noise(drawn_ptr, slices, row, q, num_rows, NOISE_SIZE)
        mean, scale = _embedded_statistics(
            slices, weight_ptr, bias_ptr, q, num_segments, NOISE_SIZE, WIDTH, SEGMENT, NORM_EPS,
            DOT_DTYPE, PRECISION,
        )  # fmt: skip
        sum_dnormal = tl.zeros((BLOCK_ROWS, SEGMENT), tl.float32)
        sum_product = tl.zeros((BLOCK_ROWS, SEGMENT), tl.float32)
        for segment in range(num_segments):
            column = segment * SEGMENT + tl.arange(0, SEGMENT)
            tile = embedded_noise(
                slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE, PRECISION
            )
            normal = (tile - mean) * scale
            dstream, dnormal = _dnormal(dstream_ptr, norm_weight_ptr, row, column, num_rows, WIDTH)
            sum_dnormal += dnormal
            sum_product += dnormal * normal
            _accumulate(sums_ptr + column, dstream * normal, column < WIDTH)
        mean_dnormal = tl.sum(sum_dnormal, axis=1)[:, None] / WIDTH
        slope = tl.sum(sum_product, axis=1)[:, None] / WIDTH
        for segment in range(num_segments):
            column = segment * SEGMENT + tl.arange(0, SEGMENT)
            tile = embedded_noise(
                slices, weight_ptr, bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE, PRECISION
            )
            _, dnormal = _dnormal(dstream_ptr, norm_weight_ptr, row, column, num_rows, WIDTH)
            gradient = (dnormal - mean_dnormal - (tile - mean) * scale * slope) * scale
            mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
            place = dmatmul_ptr + row[:, None] * WIDTH + column[None, :]
            tl.store(place, gradient.to(dmatmul_ptr.dtype.element_ty), mask=mask)
            _accumulate(sums_ptr + WIDTH + column, gradient, column < WIDTH)
        tl.debug_barrier()  # the next tile reads these sums, perhaps in other threads


@triton.jit
def _store_noise(drawn_ptr, slices, row, q, num_rows, NOISE_SIZE: tl.constexpr):
    WORDS: tl.constexpr = (NOISE_SIZE + 3) // 4
    for k in tl.static_range(4):
        element = k * WORDS + q
        mask = (row < num_rows)[:, None] & ((q < WORDS) & (element < NOISE_SIZE))[None, :]
        tl.store(drawn_ptr + row[:, None] * NOISE_SIZE + element[None, :], slices[k], mask=mask)


@triton.jit
def _dnormal(dstream_ptr, weight_ptr, row, column, num_rows, WIDTH: tl.constexpr):
    """Gradients of the stream and of x̂, 0 outside."""
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offs = row[:, None] * WIDTH + column[None, :]
    dstream = tl.load(dstream_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return dstream, dstream * weight[None, :]


@triton.jit
def _accumulate(place, tile, mask):
    """Add a tile's sum over rows to memory that no other program touches."""
    before = tl.load(place, mask=mask, other=0.0)
    tl.store(place, before + tl.sum(tile, axis=0), mask=mask)


@dataclass(frozen=True)
class Noise:
    """Noise of every row: given ``[N, R, Z]``, or drawn, N draws for each of R positions."""

    given: Tensor | None
    seed: Tensor | None  # None where noise is given
    first_row: Tensor | int
    num_draws: int
    num_positions: int
    scale: float

    @property
    def num_rows(self) -> int:
        """N R."""
        return self.num_draws * self.num_positions

    def arguments(self) -> tuple[tuple[Tensor | int, ...], tuple[int, ...]]:
        """Noise, seed and first row, and strides, as the kernels take them; a pointer stands where
        none is read.
        """
        if self.given is not None:
            return (self.given, self.given, 0), (*self.given.stride(), 0)
        assert self.seed is not None
        stride_seed = 0 if self.seed.dim() == 1 else 2
        return (self.seed, self.seed, self.first_row), (0, 0, 0, stride_seed)


def embedding_constants(
    width: int, noise_size: int, dtype: torch.dtype, arch: str, *, is_given: bool,
    is_backward: bool, has_fast_math: bool, can_round: bool = True,
) -> Constants:  # fmt: skip
    """Of `embed_kernel` or `embed_backward_kernel`.

    float32 operands are multiplied as three tf32 matmuls where there is fast mathematics. The
    interpreter would multiply 16-bit operands as bit patterns: there `can_round` is False, and they
    are multiplied in float32.
    """
    launch = setting("energy_head.embed" + ".backward" * is_backward, arch, width)
    row = row_segments(width, launch.block_features)
    constants = noise_constants(noise_size, is_given=is_given) | {
        "WIDTH": width,
        "SEGMENT": row["SEGMENT"],
        "BLOCK_ROWS": launch.block_rows,
        "NORM_EPS": NORM_EPS,
        "DOT_DTYPE": DOT_DTYPES[dtype] if can_round else tl.float32,
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
    }
    return constants, launch_options(launch)


def noise_constants(noise_size: int, *, is_given: bool) -> dict[str, Any]:
    """Of a kernel that reads or draws noise; a slice must be deep enough for a matmul."""
    words = -(-noise_size // 4)
    block = max(16, 1 << (words - 1).bit_length())
    return {"IS_GIVEN": is_given, "NOISE_SIZE": noise_size, "BLOCK_Q": block}


def _constants(noise: Noise, weight: Tensor, *, is_backward: bool) -> Constants:
    width, noise_size = weight.shape
    return embedding_constants(
        width, noise_size, weight.dtype, architecture(weight.device),
        is_given=noise.given is not None, is_backward=is_backward,
        has_fast_math=use_fast_math(), can_round=not is_interpreted(),
    )  # fmt: skip


def embed_noise(
    noise: Noise, weight: Tensor, bias: Tensor, norm: Pair, next_norm: Pair
) -> tuple[Tensor, Tensor]:
    """Residual stream ``[N R, C]`` in float32 and its LayerNorm in the dtype of the weight."""
    shape = (noise.num_rows, weight.shape[0])
    stream = weight.new_empty(shape, dtype=torch.float32)
    normed = weight.new_empty(shape)
    constants, options = _constants(noise, weight, is_backward=False)
    num_segments = -(-len(weight) // constants["SEGMENT"])
    pointers, strides = noise.arguments()
    embed_kernel[(-(-noise.num_rows // constants["BLOCK_ROWS"]),)](
        *pointers, weight, bias, *norm, *next_norm, stream, normed, noise.num_rows,
        max(1, noise.num_draws), num_segments, *strides, noise.scale, **constants, **options,
    )  # fmt: skip
    return stream, normed


def embed_noise_backward(
    noise: Noise, weight: Tensor, bias: Tensor, norm_weight: Tensor, dstream: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the matmul ``[N R, C]``, and the noise ``[N R, Z]``; fills two of the `sums`."""
    sums.zero_()  # the kernel adds to them
    dmatmul = weight.new_empty(dstream.shape)
    drawn = weight.new_empty(noise.num_rows, weight.shape[1])
    constants, options = _constants(noise, weight, is_backward=True)
    num_segments = -(-len(weight) // constants["SEGMENT"])
    pointers, strides = noise.arguments()
    embed_backward_kernel[(len(sums),)](
        *pointers, weight, bias, norm_weight, dstream, dmatmul, drawn, sums, noise.num_rows,
        max(1, noise.num_draws), len(sums), num_segments, *strides, sums.stride(0), noise.scale,
        **constants, **options,
    )  # fmt: skip
    return dmatmul, drawn
