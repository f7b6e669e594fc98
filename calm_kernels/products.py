"""Matrix products of the torch backend, and float32 products of half-precision matrices.

torch sends float32 products on x86 CPUs to MKL, which leaves half the speed of an AMD CPU unused;
oneDNN, part of the same torch, does not. Products large enough to be worth its call overhead go
there; smaller ones keep to one thread. Everything else (other dtypes and devices, autocast,
compiled graphs, `torch.func`, a torch without oneDNN, ``torch.backends.mkldnn.enabled = False``) is
`torch.nn.functional.linear`.
"""

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from calm_kernels.threads import MIN_MULTIPLICATIONS, one_thread, threads_spin

__all__ = ["add_product", "linear", "multiply", "multiply_wide", "outer", "prefers_columns"]

MIN_SHARED = 2**17  # entries of a weight from which threads share one row's product
MAX_THIN_ROWS = 4  # the slots of one decoded chunk


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias``, differentiable.

    Args:
        inputs: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]`` or None.

    Returns: ``[..., O]``.
    """
    if inputs.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(inputs, weight, bias)
    if inputs.numel() * weight.shape[0] < MIN_MULTIPLICATIONS:
        if inputs.numel() == inputs.shape[-1] == weight.shape[1]:
            return _one_row(inputs, weight, bias)
        with one_thread():
            return F.linear(inputs, weight, bias)
    if not _use_onednn(inputs, weight):
        return F.linear(inputs, weight, bias)
    return _Linear.apply(inputs, weight, bias)


def prefers_columns(weight: Tensor) -> bool:
    """Whether `linear` of one row is faster on a weight ``[O, I]`` that is stored by columns."""
    limit = MIN_SHARED if threads_spin() else MIN_MULTIPLICATIONS
    return weight.device.type == "cpu" and weight.numel() < limit


def _one_row(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of one row: on one thread, or as two equal rows, which MKL does share."""
    is_float32 = inputs.dtype == weight.dtype == torch.float32
    is_shared = weight.numel() >= MIN_SHARED and is_float32 and threads_spin()
    if not is_shared or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, weight, bias)
    row = inputs.reshape(1, -1)
    output = (weight @ torch.cat([row, row]).T)[:, 0]
    output = output.contiguous() if bias is None else output + bias
    return output.view(*inputs.shape[:-1], -1)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of two matrices ``[R, I]`` and ``[O, I]``, not differentiable."""
    if not _use_onednn(left, right):
        return left @ right.T
    if 1 < left.shape[0] <= MAX_THIN_ROWS:
        return (right @ left.T).T  # 1.5 times as fast as oneDNN, 2 times as `left @ right.T`
    return _onednn(left, right)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` of two matrices ``[R, A]`` and ``[R, B]``, not differentiable.

    oneDNN is faster with the narrower one on the left; the other order gives a transposed view.
    """
    if left.shape[1] <= right.shape[1]:
        return multiply(left.T, right.T)
    return multiply(right.T, left.T).T


def multiply_wide(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, whatever the dtype of the matrices; not differentiable."""
    if _has_wide_products(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in float32, the dtype of `total`."""
    if _has_wide_products(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _has_wide_products(matrix: Tensor) -> bool:
    """Whether the library multiplies this dtype into float32 without a copy of its inputs."""
    return matrix.device.type == "cuda" and matrix.dtype.itemsize == 2


class _Linear(Function):
    """`linear` and its two gradient products through oneDNN."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        rows = inputs.reshape(-1, inputs.shape[-1])
        return _onednn(rows, weight, bias).view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, doutputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        drows = doutputs.reshape(-1, weight.shape[0])
        rows = inputs.reshape(-1, weight.shape[1])
        if torch.is_grad_enabled():  # create_graph=True: these products are differentiated again
            dinputs, dweight = drows @ weight, drows.T @ rows
        else:
            dinputs = multiply(drows, weight.T) if needs_inputs else None
            dweight = outer(drows, rows) if needs_weight else None
        if dinputs is not None:
            dinputs = dinputs.view(inputs.shape)
        return dinputs, dweight, drows.sum(dim=0) if needs_bias else None


def _use_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether a product ``left @ right.T`` runs through oneDNN."""
    return (
        not torch.compiler.is_compiling()
        and left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.numel() * right.shape[0] >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and not _is_transformed()
        and bool(torch.backends.mkldnn.enabled)
        and _has_onednn()
    )


def _is_transformed() -> bool:
    """Whether forward derivatives or `torch.func` are at work, which need torch's own products."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _has_onednn() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (
        is_x86
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias`` of two matrices."""
    product = torch.ops.mkldnn._linear_pointwise  # also what torch.compile emits for a linear
    return product(_dense(left), _dense(right), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """A matrix without gaps, as it is or transposed: oneDNN is 50 times slower on others."""
    is_dense = matrix.is_contiguous() or matrix.T.is_contiguous()
    return matrix if is_dense else matrix.contiguous()
