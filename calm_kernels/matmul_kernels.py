"""Inside a kernel for few rows: a matmul over the whole width, with a norm of its rows.

No sum is split among programs, so that the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

__all__ = ["DOT_DTYPES", "LAYER_NORM", "NO_NORM", "RMS_NORM", "matmul_rows"]

DOT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
NO_NORM, LAYER_NORM, RMS_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def matmul_rows(
    row_ptrs, norm_weight_ptr, norm_shift_ptr, weight_ptrs, mean, scale, NORM: tl.constexpr,
    WIDTH: tl.constexpr, IS_EVEN: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight · x, ``[BLOCK_R, outputs]``, and the sum of the squares of each row, ``[BLOCK_R]``.

    x is the row; its LayerNorm, with this mean and scale; or for the RMSNorm the row times the
    norm's weight, so that the caller multiplies the result with 1 / √(squares / WIDTH + ε): the
    rows are then read once. `row_ptrs` are those of the first features, ``[BLOCK_R, BLOCK_K]``, and
    so are `weight_ptrs`, ``[BLOCK_K, outputs]``.
    """
    BLOCK_K: tl.constexpr = row_ptrs.shape[1]
    feature = tl.arange(0, BLOCK_K)
    matmul = tl.zeros([row_ptrs.shape[0], weight_ptrs.shape[1]], tl.float32)
    squares = tl.zeros([row_ptrs.shape[0], BLOCK_K], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inside = feature < WIDTH - start
        if IS_EVEN:
            rows = tl.load(row_ptrs + start)  # [BLOCK_R, BLOCK_K]
            weight = tl.load(weight_ptrs + start)  # [BLOCK_K, outputs]
        else:
            rows = tl.load(row_ptrs + start, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=inside[:, None], other=0.0)
        if NORM != NO_NORM:
            factor = tl.load(norm_weight_ptr + start + feature, mask=inside, other=0.0)
            rows = rows.to(tl.float32)
            if NORM == LAYER_NORM:
                shift = tl.load(norm_shift_ptr + start + feature, mask=inside, other=0.0)
                normal = rows * scale - mean * scale
                rows = normal * factor.to(tl.float32)[None, :] + shift.to(tl.float32)[None, :]
            else:
                squares += rows * rows
                rows *= factor.to(tl.float32)[None, :]
            rows = rows.to(weight.dtype)
        matmul = tl.dot(rows.to(DOT_DTYPE), weight.to(DOT_DTYPE), matmul, input_precision=PRECISION)
    return matmul, tl.sum(squares, axis=1)
