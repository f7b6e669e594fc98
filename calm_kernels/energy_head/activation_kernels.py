"""Activations between two matmuls of the head: bias (and context) with SiLU, and SwiGLU.

The backward kernels compute the activation again from the saved matmul. They give the gradient of
that matmul and the activation, which the gradient of the next weight needs. Each group of rows
writes its sum of the gradient over rows, a part of the bias's gradient, to `sums`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import sigmoid
from calm_kernels.tuning import Constants, architecture, launch_options, setting, use_fast_math

__all__ = [
    "activation_constants",
    "silu",
    "silu_backward",
    "silu_backward_kernel",
    "silu_kernel",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_kernel",
    "swiglu_kernel",
]


@triton.jit
def _silu_terms(x, FAST: tl.constexpr):
    """SiLU and its slope."""
    gate = sigmoid(x, FAST)
    value = x * gate
    return value, gate + value * (1.0 - gate)


@triton.jit
def _load_vector(pointer, column, WIDTH: tl.constexpr):
    """``[1, BLOCK_COLUMNS]`` in float32."""
    return tl.load(pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_draws"])
def silu_kernel(
    matmul_ptr, bias_ptr, context_ptr, out_ptr, num_rows, num_draws, stride_context,
    HAS_CONTEXT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(matmul + bias + context[row // num_draws])."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offs = row[:, None] * WIDTH + column[None, :]
    x = tl.load(matmul_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x += _load_vector(bias_ptr, column, WIDTH)
    if HAS_CONTEXT:
        position = (row.to(tl.int32) // num_draws).to(tl.int64)  # a division of 64 bits is slow
        offs_context = position[:, None] * stride_context + column[None, :]
        x += tl.load(context_ptr + offs_context, mask=mask, other=0.0).to(tl.float32)
    value = x * sigmoid(x, FAST)
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_rows_backward(
    matmul_ptr, dout_ptr, out_ptr, dmatmul_ptr, row, column, mask, shift, WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dout · SiLU'(matmul + shift), stored and returned; the activation is stored, too."""
    offs = row[:, None] * WIDTH + column[None, :]
    x = tl.load(matmul_ptr + offs, mask=mask, other=0.0).to(tl.float32) + shift
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out, slope = _silu_terms(x, FAST)
    gradient = dout * slope
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(dmatmul_ptr + offs, gradient.to(dmatmul_ptr.dtype.element_ty), mask=mask)
    return gradient


@triton.jit(do_not_specialize=["num_positions", "num_draws", "num_groups"])
def silu_backward_kernel(
    matmul_ptr, bias_ptr, context_ptr, dout_ptr, out_ptr, dmatmul_ptr, dcontext_ptr, sums_ptr,
    num_positions, num_draws, num_groups, stride_context, stride_group, HAS_CONTEXT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dmatmul = dout · SiLU'(x) with x as in `silu_kernel`, and out again.

    dcontext is the sum of dmatmul over the draws of a position. Without context every row is a
    position.
    """
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias = _load_vector(bias_ptr, column, WIDTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tile in range(group, tl.cdiv(num_positions, BLOCK_ROWS), num_groups):
        position = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (position < num_positions)[:, None] & (column < WIDTH)[None, :]
        offs_context = position[:, None] * stride_context + column[None, :]
        if HAS_CONTEXT:
            shift = bias + tl.load(context_ptr + offs_context, mask=mask, other=0.0).to(tl.float32)
        else:
            shift = bias
        if HAS_CONTEXT:
            dcontext = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for draw in range(num_draws):
                dcontext += _silu_rows_backward(
                    matmul_ptr, dout_ptr, out_ptr, dmatmul_ptr, position * num_draws + draw, column,
                    mask, shift, WIDTH, FAST,
                )  # fmt: skip
            rounded = dcontext.to(dcontext_ptr.dtype.element_ty)
            tl.store(dcontext_ptr + offs_context, rounded, mask=mask)
        else:
            dcontext = _silu_rows_backward(
                matmul_ptr, dout_ptr, out_ptr, dmatmul_ptr, position, column, mask, shift, WIDTH,
                FAST,
            )  # fmt: skip
        total += dcontext
    place = sums_ptr + group.to(tl.int64) * stride_group + column
    tl.store(place, tl.sum(total, axis=0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    matmul_ptr, bias_ptr, out_ptr, num_rows, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(gate) · up with [gate; up] = matmul + bias, ``[2 WIDTH]`` a row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offs = row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(matmul_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(matmul_ptr + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    gate += _load_vector(bias_ptr, column, WIDTH)
    up += _load_vector(bias_ptr + WIDTH, column, WIDTH)
    value = (gate * sigmoid(gate, FAST) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def swiglu_backward_kernel(
    matmul_ptr, bias_ptr, dout_ptr, out_ptr, dmatmul_ptr, sums_ptr, num_rows, num_groups,
    stride_group, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dgate = dout · up · SiLU'(gate), dup = dout · SiLU(gate), and out again."""
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias_gate = _load_vector(bias_ptr, column, WIDTH)
    bias_up = _load_vector(bias_ptr + WIDTH, column, WIDTH)
    total_gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    total_up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tile in range(group, tl.cdiv(num_rows, BLOCK_ROWS), num_groups):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        offs = row[:, None] * (2 * WIDTH) + column[None, :]
        offs_out = row[:, None] * WIDTH + column[None, :]
        gate = tl.load(matmul_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias_gate
        up = tl.load(matmul_ptr + WIDTH + offs, mask=mask, other=0.0).to(tl.float32) + bias_up
        dout = tl.load(dout_ptr + offs_out, mask=mask, other=0.0).to(tl.float32)
        value, slope = _silu_terms(gate, FAST)
        dgate = dout * up * slope
        dup = dout * value
        tl.store(out_ptr + offs_out, (value * up).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(dmatmul_ptr + offs, dgate.to(dmatmul_ptr.dtype.element_ty), mask=mask)
        tl.store(dmatmul_ptr + WIDTH + offs, dup.to(dmatmul_ptr.dtype.element_ty), mask=mask)
        total_gate += dgate
        total_up += dup
    place = sums_ptr + group.to(tl.int64) * stride_group + column
    tl.store(place, tl.sum(total_gate, axis=0), mask=column < WIDTH)
    tl.store(place + WIDTH, tl.sum(total_up, axis=0), mask=column < WIDTH)


def activation_constants(width: int, arch: str, *, has_fast_math: bool) -> Constants:
    """Of the SiLU and SwiGLU kernels, flags apart."""
    launch = setting("energy_head.activation", arch, width)
    block = min(256, 1 << (width - 1).bit_length())
    constants = {
        "WIDTH": width,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_COLUMNS": block,
        "FAST": has_fast_math,
    }
    return constants, launch_options(launch)


def _constants(width: int, tensor: Tensor) -> Constants:
    arch = architecture(tensor.device)
    return activation_constants(width, arch, has_fast_math=use_fast_math())


def _grid(num_rows: int, width: int, constants: dict[str, Any]) -> tuple[int, int]:
    rows, columns = constants["BLOCK_ROWS"], constants["BLOCK_COLUMNS"]
    return -(-num_rows // rows), -(-width // columns)


def silu(matmul: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
    """SiLU(matmul + bias + context), the context ``[R, C]`` for N rows each."""
    num_rows, width = matmul.shape
    out = torch.empty_like(matmul)
    constants, options = _constants(width, matmul)
    grid = _grid(num_rows, width, constants)
    silu_kernel[grid](
        matmul, bias, matmul if context is None else context, out, num_rows,
        max(1, _draws(matmul, context)), 0 if context is None else context.stride(0),
        HAS_CONTEXT=context is not None, **constants, **options,
    )  # fmt: skip
    return out


def silu_backward(
    dout: Tensor, matmul: Tensor, bias: Tensor, sums: Tensor, context: Tensor | None = None,
    dcontext: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the matmul, and the activation again; fills one vector of `sums`.

    The context's gradient goes to `dcontext`, which has its strides.
    """
    width = matmul.shape[1]
    # Not in place: of few features several threads hold the same one, and add it to the sums.
    dmatmul, out = torch.empty_like(dout), torch.empty_like(matmul)
    constants, options = _constants(width, matmul)
    silu_backward_kernel[(len(sums), -(-width // constants["BLOCK_COLUMNS"]))](
        matmul, bias, matmul if context is None else context, dout, out, dmatmul,
        matmul if dcontext is None else dcontext, sums,
        len(matmul if context is None else context), _draws(matmul, context), len(sums),
        0 if context is None else context.stride(0), sums.stride(0),
        HAS_CONTEXT=context is not None, **constants, **options,
    )  # fmt: skip
    return dmatmul, out


def _draws(matmul: Tensor, context: Tensor | None) -> int:
    """Rows of the matmul for each row of the context."""
    return 1 if context is None else len(matmul) // max(1, len(context))


def swiglu(matmul: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) · up of ``[gate; up] = matmul + bias``, ``[rows, C]``."""
    num_rows, width = matmul.shape[0], matmul.shape[1] // 2
    out = matmul.new_empty(num_rows, width)
    constants, options = _constants(width, matmul)
    grid = _grid(num_rows, width, constants)
    swiglu_kernel[grid](matmul, bias, out, num_rows, **constants, **options)
    return out


def swiglu_backward(
    dout: Tensor, matmul: Tensor, bias: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the matmul ``[rows, 2C]``, and the activation again; fills two of the `sums`."""
    width = matmul.shape[1] // 2
    out, dmatmul = torch.empty_like(dout), torch.empty_like(matmul)
    constants, options = _constants(width, matmul)
    swiglu_backward_kernel[(len(sums), -(-width // constants["BLOCK_COLUMNS"]))](
        matmul, bias, dout, out, dmatmul, sums, len(matmul), len(sums), sums.stride(0),
        **constants, **options,
    )  # fmt: skip
    return dmatmul, out
