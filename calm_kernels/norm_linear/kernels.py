"""Kernels of the layers: a matmul of few rows with its norm before it and its sum or SwiGLU after.

A program multiplies BLOCK_R rows with BLOCK_C outputs over the whole width, so that every weight is
read once. The RMSNorm costs no second read of the rows: its scale is a factor of the result, see
`matmul_rows`. Rows and outputs past the end repeat the last one; offsets fit into 32 bits.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.device import silu
from calm_kernels.matmul_kernels import DOT_DTYPES, NO_NORM, RMS_NORM, matmul_rows
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting, use_fast_math

__all__ = [
    "Form",
    "launch_linear_residual",
    "launch_norm_linear",
    "launch_norm_swiglu",
    "layer_constants",
    "linear_residual_kernel",
    "norm_linear_kernel",
    "norm_swiglu_kernel",
]

Form = Literal["norm_linear", "norm_swiglu", "linear_residual"]


@triton.jit
def _block_rows(num_rows, BLOCK_R: tl.constexpr):
    """Rows of this program, past the end the last one, and which of them are its own."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    return tl.minimum(row, num_rows - 1), row < num_rows


@triton.jit
def _row_ptrs(rows_ptr, row, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    return rows_ptr + row[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _weight_ptrs(weight_ptr, output, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    return weight_ptr + output[None, :] * WIDTH + tl.arange(0, BLOCK_K)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def norm_linear_kernel(
    rows_ptr, norm_weight_ptr, first_ptr, second_ptr, third_ptr, out_ptr, num_rows, norm_eps,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, WIDTH: tl.constexpr,
    IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(rows) · [first, second, third], which have FIRST, SECOND and THIRD outputs."""
    wait_for_previous(OVERLAP)
    row, is_own = _block_rows(num_rows, BLOCK_R)
    block = tl.program_id(1)
    weight_ptr, outputs, before = first_ptr, FIRST, 0
    BLOCKS: tl.constexpr = (FIRST + BLOCK_C - 1) // BLOCK_C
    NEXT_BLOCKS: tl.constexpr = BLOCKS + (SECOND + BLOCK_C - 1) // BLOCK_C
    if block >= NEXT_BLOCKS:
        weight_ptr, outputs, before = third_ptr, THIRD, FIRST + SECOND
        block -= NEXT_BLOCKS
    elif block >= BLOCKS:
        weight_ptr, outputs, before = second_ptr, SECOND, FIRST
        block -= BLOCKS
    output = block * BLOCK_C + tl.arange(0, BLOCK_C)
    matmul, squares = matmul_rows(
        _row_ptrs(rows_ptr, row, WIDTH, BLOCK_K), norm_weight_ptr, norm_weight_ptr,
        _weight_ptrs(weight_ptr, tl.minimum(output, outputs - 1), WIDTH, BLOCK_K), 0.0, 1.0,
        RMS_NORM, WIDTH, IS_EVEN, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    value = matmul * tl.rsqrt(squares / WIDTH + norm_eps)[:, None]
    offs = row[:, None] * (FIRST + SECOND + THIRD) + (before + output)[None, :]
    mask = is_own[:, None] & (output < outputs)[None, :]
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def norm_swiglu_kernel(
    rows_ptr, norm_weight_ptr, gate_ptr, up_ptr, out_ptr, num_rows, norm_eps,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = SiLU(RMSNorm(rows) · gate) ⊙ (RMSNorm(rows) · up).

    The columns of one matmul are gate and up in turn, so that a thread has both.
    """
    wait_for_previous(OVERLAP)
    row, is_own = _block_rows(num_rows, BLOCK_R)
    index = tl.arange(0, 2 * BLOCK_C)
    output = tl.minimum(tl.program_id(1) * BLOCK_C + index // 2, OUTPUTS - 1)
    weight_ptrs = tl.where(
        (index % 2 == 0)[None, :],
        _weight_ptrs(gate_ptr, output, WIDTH, BLOCK_K),
        _weight_ptrs(up_ptr, output, WIDTH, BLOCK_K),
    )
    matmul, squares = matmul_rows(
        _row_ptrs(rows_ptr, row, WIDTH, BLOCK_K), norm_weight_ptr, norm_weight_ptr, weight_ptrs,
        0.0, 1.0, RMS_NORM, WIDTH, IS_EVEN, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    matmul *= tl.rsqrt(squares / WIDTH + norm_eps)[:, None]
    gate, up = tl.split(tl.reshape(matmul, (BLOCK_R, BLOCK_C, 2)))
    value = (silu(gate, FAST) * up).to(out_ptr.dtype.element_ty)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = is_own[:, None] & (column < OUTPUTS)[None, :]
    tl.store(out_ptr + row[:, None] * OUTPUTS + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_residual_kernel(
    rows_ptr, weight_ptr, residual_ptr, out_ptr, num_rows, OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = residual + rows · weight; the residual is loaded first, which hides the wait."""
    wait_for_previous(OVERLAP)
    row, is_own = _block_rows(num_rows, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs = row[:, None] * OUTPUTS + column[None, :]
    mask = is_own[:, None] & (column < OUTPUTS)[None, :]
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    output = tl.minimum(column, OUTPUTS - 1)
    matmul, _ = matmul_rows(
        _row_ptrs(rows_ptr, row, WIDTH, BLOCK_K), rows_ptr, rows_ptr,
        _weight_ptrs(weight_ptr, output, WIDTH, BLOCK_K), 0.0, 1.0,
        NO_NORM, WIDTH, IS_EVEN, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    tl.store(out_ptr + offs, (residual + matmul).to(out_ptr.dtype.element_ty), mask=mask)


def layer_constants(
    form: Form, num_rows: int, width: int, dtype: torch.dtype, arch: str, *, has_fast_math: bool,
    can_round: bool = True, **outputs: int,
) -> Constants:  # fmt: skip
    """Of the kernel of this form, with its numbers of outputs.

    float32 operands are multiplied as three tf32 matmuls where there is fast mathematics. The
    interpreter would multiply 16-bit operands as bit patterns: there `can_round` is False, and they
    are multiplied in float32.
    """
    name = "norm_linear" + ".fp32" * (dtype == torch.float32)
    chosen = setting(name + ".norm" * (form != "linear_residual"), arch, num_rows)
    constants = {
        "WIDTH": width,
        "IS_EVEN": width % chosen.block_features == 0,
        "BLOCK_R": chosen.block_rows,
        "BLOCK_C": chosen.block_outputs,
        "BLOCK_K": chosen.block_features,
        "DOT_DTYPE": DOT_DTYPES[dtype if can_round else torch.float32],
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
    }
    if form == "norm_swiglu":
        constants["FAST"] = has_fast_math
    return overlapped(constants | outputs, launch_options(chosen), arch)


def _constants(form: Form, rows: Tensor, **outputs: int) -> tuple[tuple[int, int], Constants]:
    """Grid and constants; each weight has its own blocks of outputs."""
    num_rows, width = rows.shape
    constants, options = layer_constants(
        form, num_rows, width, rows.dtype, architecture(rows.device),
        has_fast_math=use_fast_math(), can_round=not is_interpreted(), **outputs,
    )  # fmt: skip
    blocks = sum(-(-count // constants["BLOCK_C"]) for count in outputs.values())
    return (-(-num_rows // constants["BLOCK_R"]), blocks), (constants, options)


def launch_norm_linear(
    rows: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], out: Tensor, norm_eps: float
) -> None:
    """Fill `out`, ``[R, Σ O_i]``, from up to three weights."""
    if not len(rows):
        return
    counts = (*map(len, weights), 0, 0)
    grid, (constants, options) = _constants(
        "norm_linear", rows, FIRST=counts[0], SECOND=counts[1], THIRD=counts[2]
    )
    pointers = (*weights, weights[0], weights[0])[:3]
    norm_linear_kernel[grid](
        rows, norm_weight, *pointers, out, len(rows), norm_eps, **constants, **options
    )


def launch_norm_swiglu(
    rows: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, out: Tensor, norm_eps: float
) -> None:
    """Fill `out`, ``[R, O]``."""
    if not len(rows):
        return
    grid, (constants, options) = _constants("norm_swiglu", rows, OUTPUTS=len(gate))
    norm_swiglu_kernel[grid](
        rows, norm_weight, gate, up, out, len(rows), norm_eps, **constants, **options
    )


def launch_linear_residual(rows: Tensor, weight: Tensor, residual: Tensor, out: Tensor) -> None:
    """Fill `out`, ``[R, O]``."""
    if not len(rows):
        return
    grid, (constants, options) = _constants("linear_residual", rows, OUTPUTS=len(weight))
    linear_residual_kernel[grid](rows, weight, residual, out, len(rows), **constants, **options)
