"""Matmuls of half-precision matrices with a float32 result."""

import torch
from torch import Tensor

from calm_kernels.precision import accumulation_dtype

__all__ = ["add_matmul_fp32", "matmul_fp32"]


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32 (float64 for float64); not differentiable."""
    if _accumulates_in_fp32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    dtype = accumulation_dtype(left.dtype)
    return left.to(dtype) @ right.to(dtype)


def add_matmul_fp32(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in float32, the dtype of `total`."""
    if _accumulates_in_fp32(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _accumulates_in_fp32(matrix: Tensor) -> bool:
    """Whether the library multiplies this dtype into float32 without a copy of its inputs."""
    return matrix.device.type == "cuda" and matrix.dtype.itemsize == 2
