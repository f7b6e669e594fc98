"""What stands between two products of the head: bias (and context) with SiLU, and SwiGLU.

The backward passes compute the activation again from the stored product and give both the gradient
of the product and the activation, which the gradient of the next weight needs. A group of rows
leaves its sum of the gradient over rows, the bias's gradient, in `sums`.
"""

import triton
import triton.language as tl

from calm_kernels.device import exp2, reciprocal

__all__ = ["silu_backward_kernel", "silu_kernel", "swiglu_backward_kernel", "swiglu_kernel"]

_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(x * _MINUS_LOG2_E, FAST))


@triton.jit
def _silu_terms(x, FAST: tl.constexpr):
    """SiLU and its slope."""
    gate = _sigmoid(x, FAST)
    value = x * gate
    return value, gate + value * (1.0 - gate)


@triton.jit
def _load_vector(pointer, column, WIDTH: tl.constexpr):
    """``[1, BLOCK_COLUMNS]`` in float32."""
    return tl.load(pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_draws"])
def silu_kernel(
    product_ptr, bias_ptr, context_ptr, out_ptr, num_rows, num_draws, stride_context,
    HAS_CONTEXT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(product + bias + context[row // num_draws])."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offs = row[:, None] * WIDTH + column[None, :]
    x = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x += _load_vector(bias_ptr, column, WIDTH)
    if HAS_CONTEXT:
        patch = (row.to(tl.int32) // num_draws).to(tl.int64)  # a division of 64 bits is slow
        offs_context = patch[:, None] * stride_context + column[None, :]
        x += tl.load(context_ptr + offs_context, mask=mask, other=0.0).to(tl.float32)
    value = x * _sigmoid(x, FAST)
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_rows_backward(
    product_ptr, dout_ptr, out_ptr, dproduct_ptr, row, column, mask, shift, WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dout · SiLU'(product + shift), stored and returned; the activation is stored, too."""
    offs = row[:, None] * WIDTH + column[None, :]
    x = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32) + shift
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out, slope = _silu_terms(x, FAST)
    gradient = dout * slope
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(dproduct_ptr + offs, gradient.to(dproduct_ptr.dtype.element_ty), mask=mask)
    return gradient


@triton.jit(do_not_specialize=["num_patches", "num_draws", "num_groups"])
def silu_backward_kernel(
    product_ptr, bias_ptr, context_ptr, dout_ptr, out_ptr, dproduct_ptr, dcontext_ptr, sums_ptr,
    num_patches, num_draws, num_groups, stride_context, stride_group, HAS_CONTEXT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """dproduct = dout · SiLU'(x) with x as in `silu_kernel`, and out again; dproduct may be dout.

    dcontext is the sum of dproduct over the draws of a patch. Without context a patch is a row.
    """
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias = _load_vector(bias_ptr, column, WIDTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tile in range(group, tl.cdiv(num_patches, BLOCK_ROWS), num_groups):
        patch = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (patch < num_patches)[:, None] & (column < WIDTH)[None, :]
        offs_context = patch[:, None] * stride_context + column[None, :]
        if HAS_CONTEXT:
            shift = bias + tl.load(context_ptr + offs_context, mask=mask, other=0.0).to(tl.float32)
        else:
            shift = bias
        if HAS_CONTEXT:
            dcontext = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for draw in range(num_draws):
                dcontext += _silu_rows_backward(
                    product_ptr, dout_ptr, out_ptr, dproduct_ptr, patch * num_draws + draw, column,
                    mask, shift, WIDTH, FAST,
                )  # fmt: skip
            rounded = dcontext.to(dcontext_ptr.dtype.element_ty)
            tl.store(dcontext_ptr + offs_context, rounded, mask=mask)
        else:
            dcontext = _silu_rows_backward(
                product_ptr, dout_ptr, out_ptr, dproduct_ptr, patch, column, mask, shift, WIDTH,
                FAST,
            )  # fmt: skip
        total += dcontext
    place = sums_ptr + group.to(tl.int64) * stride_group + column
    tl.store(place, tl.sum(total, axis=0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    product_ptr, bias_ptr, out_ptr, num_rows, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = SiLU(gate) · up with [gate; up] = product + bias, ``[2 WIDTH]`` a row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    offs = row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(product_ptr + WIDTH + offs, mask=mask, other=0.0).to(tl.float32)
    gate += _load_vector(bias_ptr, column, WIDTH)
    up += _load_vector(bias_ptr + WIDTH, column, WIDTH)
    value = (gate * _sigmoid(gate, FAST) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def swiglu_backward_kernel(
    product_ptr, bias_ptr, dout_ptr, out_ptr, dproduct_ptr, sums_ptr, num_rows, num_groups,
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
        gate = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias_gate
        up = tl.load(product_ptr + WIDTH + offs, mask=mask, other=0.0).to(tl.float32) + bias_up
        dout = tl.load(dout_ptr + offs_out, mask=mask, other=0.0).to(tl.float32)
        value, slope = _silu_terms(gate, FAST)
        dgate = dout * up * slope
        dup = dout * value
        tl.store(out_ptr + offs_out, (value * up).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(dproduct_ptr + offs, dgate.to(dproduct_ptr.dtype.element_ty), mask=mask)
        tl.store(dproduct_ptr + WIDTH + offs, dup.to(dproduct_ptr.dtype.element_ty), mask=mask)
        total_gate += dgate
        total_up += dup
    place = sums_ptr + group.to(tl.int64) * stride_group + column
    tl.store(place, tl.sum(total_gate, axis=0), mask=column < WIDTH)
    tl.store(place + WIDTH, tl.sum(total_up, axis=0), mask=column < WIDTH)
