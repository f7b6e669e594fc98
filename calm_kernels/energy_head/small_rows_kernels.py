"""Fused layers of the head for few rows: a matmul with everything before and after it.

A program multiplies BLOCK_R rows with the weights of BLOCK_C features over the whole width: no sum
is split among programs. The LayerNorm of the residual stream is applied while rows are loaded. Its
statistics come from the mean and squared deviations that the layer before stored for every tile of
features, combined after Chan. What is added to a matmul is loaded before it, which hides the wait.

Rows and weights past the end repeat the last one; offsets fit into 32 bits.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.device import silu
from calm_kernels.energy_head.embedding_kernels import (
    Noise,
    embedded_noise,
    noise_constants,
    noise_slices,
)
from calm_kernels.energy_head.parameters import NORM_EPS, Pair
from calm_kernels.matmul_kernels import DOT_DTYPES, LAYER_NORM, NO_NORM, matmul_rows
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting, use_fast_math

__all__ = [
    "Form",
    "embed_layer",
    "embed_layer_kernel",
    "layer_constants",
    "residual_layer",
    "residual_layer_kernel",
    "silu_layer",
    "silu_layer_kernel",
    "swiglu_layer",
    "swiglu_layer_kernel",
]

Form = Literal["embed", "silu", "swiglu", "residual"]
_BLOCK_TILES = 32  # tiles whose statistics are in registers at once


@triton.jit
def _rows_and_features(num_rows, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows (past the end the last one) and features of this program, and the mask of its output."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    return tl.minimum(row, num_rows - 1), column, mask


@triton.jit
def _tiles(
    parts_ptr, row, num_rows, first, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_T tiles of each row, ``[BLOCK_R, BLOCK_T]``, and the tiles' widths."""
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
def _matmul(
    rows_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, row, output, mean, scale, stride_output,
    NORM: tl.constexpr, WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight[output] · x with x the row or its LayerNorm, ``[BLOCK_R, outputs]``."""
    feature = tl.arange(0, BLOCK_K)
    row_ptrs = rows_ptr + row[:, None] * WIDTH + feature[None, :]
    weight_ptrs = weight_ptr + output[None, :] * stride_output + feature[:, None]
    matmul, _ = matmul_rows(
        row_ptrs, norm_weight_ptr, norm_shift_ptr, weight_ptrs, mean, scale, NORM, WIDTH, IS_EVEN,
        DOT_DTYPE, PRECISION,
    )  # fmt: skip
    return matmul


@triton.jit(do_not_specialize=["first_row", "num_positions", "num_rows", "num_draws"])
def embed_layer_kernel(
    hidden_ptr, hidden_weight_ptr, hidden_bias_ptr, embedded_ptr, noise_ptr, seed_ptr, first_row,
    noise_weight_ptr, noise_bias_ptr, stream_ptr, num_positions, num_rows, num_draws, stride_n,
    stride_r, stride_z, stride_seed, noise_scale, IS_GIVEN: tl.constexpr,
    NOISE_SIZE: tl.constexpr, WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """embedded = weight · hidden + bias in the first programs of an axis, and in the others
    stream = weight' · noise + bias', noise as in `embedding_kernels`; both in float32.
    """
    wait_for_previous(OVERLAP)
    num_blocks = tl.cdiv(num_positions, BLOCK_R)
    block = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if block < num_blocks:
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        bias = tl.load(hidden_bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        embedded = _matmul(
            hidden_ptr, hidden_bias_ptr, hidden_bias_ptr, hidden_weight_ptr,
            tl.minimum(row, num_positions - 1), tl.minimum(column, WIDTH - 1), 0.0, 1.0, WIDTH,
            NO_NORM, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
        )  # fmt: skip
        mask = (row < num_positions)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * WIDTH + column[None, :]
        tl.store(embedded_ptr + offs, embedded + bias[None, :], mask=mask)
    else:
        row = (block - num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        q = tl.arange(0, BLOCK_Q)
        slices = noise_slices(
            noise_ptr, seed_ptr, first_row, row, q, num_rows, num_draws, stride_n, stride_r,
            stride_z, stride_seed, noise_scale, IS_GIVEN, NOISE_SIZE,
            noise_weight_ptr.dtype.element_ty,
        )  # fmt: skip
        stream = embedded_noise(
            slices, noise_weight_ptr, noise_bias_ptr, q, column, NOISE_SIZE, WIDTH, DOT_DTYPE,
            PRECISION,
        )  # fmt: skip
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        tl.store(stream_ptr + row[:, None] * WIDTH + column[None, :], stream, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_draws"])
def silu_layer_kernel(
    rows_ptr, parts_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, bias_ptr, condition_ptr,
    out_ptr, num_rows, num_draws, stride_output, HAS_NORM: tl.constexpr, IS_JOINED: tl.constexpr,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr, NORM_EPS: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = SiLU(weight · x + bias), x = rows or LN(rows), or with [x; condition[row // num_draws]]
    in place of x, of which the weight has a half each.
    """
    wait_for_previous(OVERLAP)
    row, column, mask = _rows_and_features(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    shift = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    mean, scale = 0.0, 1.0
    if HAS_NORM:
        mean, scale = _statistics(parts_ptr, row, num_rows, WIDTH, TILE, BLOCK_T, NORM_EPS)
    output = tl.minimum(column, WIDTH - 1)
    matmul = _matmul(
        rows_ptr, norm_weight_ptr, norm_shift_ptr, weight_ptr, row, output, mean, scale,
        stride_output, LAYER_NORM if HAS_NORM else NO_NORM, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE,
        PRECISION,
    )  # fmt: skip
    if IS_JOINED:
        matmul += _matmul(
            condition_ptr, bias_ptr, bias_ptr, weight_ptr + WIDTH, row // num_draws, output, 0.0,
            1.0, stride_output, NO_NORM, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
        )  # fmt: skip
    value = silu(matmul + shift, FAST).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_layer_kernel(
    rows_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, stride_output, WIDTH: tl.constexpr,
    IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = SiLU(gate) · up with [gate; up] = weight · rows + bias, ``[2 WIDTH, WIDTH]``.

    The columns of one matmul are gate and up in turn, so that a thread has both.
    """
    wait_for_previous(OVERLAP)
    row, column, mask = _rows_and_features(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    index = tl.arange(0, 2 * BLOCK_C)
    output = tl.minimum(tl.program_id(1) * BLOCK_C + index // 2, WIDTH - 1) + (index % 2) * WIDTH
    bias = tl.load(bias_ptr + output).to(tl.float32)[None, :]
    matmul = _matmul(
        rows_ptr, bias_ptr, bias_ptr, weight_ptr, row, output, 0.0, 1.0, stride_output, NO_NORM,
        WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(matmul + bias, (BLOCK_R, BLOCK_C, 2)))
    value = (silu(gate, FAST) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def residual_layer_kernel(
    rows_ptr, weight_ptr, bias_ptr, stream_ptr, parts_ptr, num_rows, stride_output,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """stream += weight · rows + bias in float32, and of each tile's row its mean and the sum of
    squared deviations from it: parts ``[2, tiles, rows]``.
    """
    wait_for_previous(OVERLAP)
    TILES: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    row, column, mask = _rows_and_features(num_rows, WIDTH, BLOCK_R, BLOCK_C)
    stream_ptrs = stream_ptr + row[:, None] * WIDTH + column[None, :]
    stream = tl.load(stream_ptrs, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    matmul = _matmul(
        rows_ptr, bias_ptr, bias_ptr, weight_ptr, row, tl.minimum(column, WIDTH - 1), 0.0, 1.0,
        stride_output, NO_NORM, WIDTH, IS_EVEN, BLOCK_K, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    stream = tl.where(mask, stream + (matmul + bias), 0.0)
    tl.store(stream_ptrs, stream, mask=mask)
    tile = tl.program_id(1)
    mean = tl.sum(stream, axis=1) / tl.minimum(WIDTH - tile * BLOCK_C, BLOCK_C)
    difference = tl.where(mask, stream - mean[:, None], 0.0)
    spread = tl.sum(difference * difference, axis=1)
    own = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tile * num_rows + own
    tl.store(parts_ptr + offs, mean, mask=own < num_rows)
    tl.store(parts_ptr + TILES * num_rows + offs, spread, mask=own < num_rows)


def layer_constants(
    form: Form, num_rows: int, width: int, dtype: torch.dtype, arch: str, *, has_fast_math: bool,
    can_round: bool = True, **flags: int,
) -> Constants:  # fmt: skip
    """Of the kernel of this form, with its flags (of the embedding `noise_constants`); dtypes as in
    `embedding_constants`.
    """
    name = "energy_head.layer" + ".fp32" * (dtype == torch.float32)
    chosen = setting(name + ".norm" * bool(flags.get("HAS_NORM")), arch, num_rows)
    constants = {
        "WIDTH": width,
        "IS_EVEN": width % chosen.block_features == 0,
        "BLOCK_R": chosen.block_rows,
        "BLOCK_C": chosen.block_outputs,
        "BLOCK_K": chosen.block_features,
        "DOT_DTYPE": DOT_DTYPES[dtype if can_round else torch.float32],
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
    }
    if form in ("silu", "swiglu"):
        constants["FAST"] = has_fast_math
    if form == "silu":
        tile = setting(name, arch, num_rows).block_outputs  # of the residual layer
        block = min(_BLOCK_TILES, 1 << (-(-width // tile) - 1).bit_length())
        constants |= {"TILE": tile, "BLOCK_T": block, "NORM_EPS": NORM_EPS}
    return overlapped(constants | flags, launch_options(chosen), arch)


def _constants(
    form: Form, rows: Tensor, weight: Tensor, **flags: int
) -> tuple[tuple[int, int], Constants]:
    num_rows, width = rows.shape
    constants, options = layer_constants(
        form, num_rows, width, weight.dtype, architecture(rows.device),
        has_fast_math=use_fast_math(), can_round=not is_interpreted(), **flags,
    )  # fmt: skip
    grid = (-(-num_rows // constants["BLOCK_R"]), -(-width // constants["BLOCK_C"]))
    return grid, (constants, options)


def embed_layer(
    hidden: Tensor, noise: Noise, hidden_embd: Pair, noise_embd: Pair
) -> tuple[Tensor, Tensor]:
    """Hidden states ``[R, C]`` and noise ``[N R, C]``, embedded, in float32 and before their norms.

    One launch: neither waits for the other.
    """
    weight, bias = noise_embd
    width, noise_size = weight.shape
    embedded = torch.empty_like(hidden, dtype=torch.float32)
    stream = weight.new_empty(noise.num_rows, width, dtype=torch.float32)
    flags = noise_constants(noise_size, is_given=noise.given is not None)
    (blocks, columns), (constants, options) = _constants("embed", stream, weight, **flags)
    blocks += -(-len(hidden) // constants["BLOCK_R"])
    sources, strides = noise.arguments()
    embed_layer_kernel[(blocks, columns)](
        hidden, *hidden_embd, embedded, *sources, weight, bias, stream, len(hidden),
        noise.num_rows, noise.num_draws, *strides, noise.scale, **constants, **options,
    )  # fmt: skip
    return embedded, stream


def silu_layer(
    rows: Tensor, linear: Pair, norm: Pair | None = None, parts: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SiLU(weight · x + bias), x the rows or, with `parts` of them, their LayerNorm.

    With a condition ``[R, C]``, each for N rows, the weight is ``[C, 2C]``, and [x; condition]
    stands in place of x.
    """
    weight, bias = linear
    out = weight.new_empty(rows.shape)
    flags = {"HAS_NORM": parts is not None, "IS_JOINED": condition is not None}
    grid, (constants, options) = _constants("silu", rows, weight, **flags)
    shared = rows if condition is None else condition
    silu_layer_kernel[grid](
        rows, rows if parts is None else parts, *(norm or linear), weight, bias, shared, out,
        len(rows), len(rows) // len(shared), weight.stride(0), **constants, **options,
    )  # fmt: skip
    return out


def swiglu_layer(rows: Tensor, linear: Pair) -> Tensor:
    """SiLU(gate) · up of ``[gate; up] = weight · rows + bias``."""
    weight, bias = linear
    out = torch.empty_like(rows)
    grid, (constants, options) = _constants("swiglu", rows, weight)
    swiglu_layer_kernel[grid](
        rows, weight, bias, out, len(rows), weight.stride(0), **constants, **options
    )
    return out


def residual_layer(rows: Tensor, linear: Pair, stream: Tensor) -> Tensor:
    """Add weight · rows + bias to the stream; the parts of its statistics ``[2, tiles, rows]``."""
    weight, bias = linear
    grid, (constants, options) = _constants("residual", rows, weight)
    parts = stream.new_empty(2, grid[1], len(rows))
    residual_layer_kernel[grid](
        rows, weight, bias, stream, parts, len(rows), weight.stride(0), **constants, **options
    )
    return parts
