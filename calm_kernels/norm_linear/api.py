"""The public functions: check the arguments, choose the backend, call it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor
from calm_kernels.norm_linear.eager import (
    linear_residual_eager,
    norm_linear_eager,
    norm_swiglu_eager,
)
from calm_kernels.norm_linear.reference import (
    linear_residual_reference,
    norm_linear_reference,
    norm_swiglu_reference,
)

__all__ = ["linear_residual", "norm_linear", "norm_swiglu"]

MAX_WEIGHTS = 3  # of one call of the kernel: query, key and value
MAX_ELEMENTS = 2**31  # of a weight, of the rows, of the output: offsets have 32 bits


def norm_linear(
    rows: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_eps: float,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Linear layers without bias of one RMSNorm, their outputs side by side.

    out = [x̂ W_1ᵀ, x̂ W_2ᵀ, ...],    x̂ = x / √(mean x² + norm_eps) ⊙ norm_weight

    Args:
        rows: x, ``[..., H]``, any float dtype.
        norm_weight: ``[H]``, dtype and device of `rows`, like all weights.
        weights: W_i, ``[O_i, H]``; for Triton at most three.
        norm_eps: added to the mean square.
        backend: see `calm_kernels.backend`. Triton takes contiguous weights in float32 or bfloat16,
            and rounds x ⊙ norm_weight where the others round x̂.

    Returns: ``[..., Σ O_i]``. Differentiable, but not with Triton.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Cost: 2 H Σ O_i operations a row. The kernel reads each weight once, whatever the number of rows
        up to 32, and is meant for few: beyond 64 the library's matmul is faster.
    """
    if not weights:
        raise ValueError("weights must hold at least one weight, got none")
    named = {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    inputs = _check_rows(rows, norm_weight, named)
    num_outputs = sum(len(weight) for weight in weights)
    obstacle = _obstacle(rows, num_outputs, norm_weight, *weights)
    if len(weights) > MAX_WEIGHTS:
        obstacle = f"takes up to {MAX_WEIGHTS} weights, got {len(weights)}"
    match resolve(backend, "norm_linear", rows, obstacle=obstacle):
        case Backend.REFERENCE:
            out = norm_linear_reference(inputs, norm_weight, weights, norm_eps)
        case Backend.TRITON:
            from calm_kernels.norm_linear.function import norm_linear_triton

            out = norm_linear_triton(inputs, norm_weight, weights, norm_eps)
        case _:
            out = norm_linear_eager(inputs, norm_weight, weights, norm_eps)
    return out.view(*rows.shape[:-1], out.shape[-1])


def norm_swiglu(
    rows: Tensor,
    norm_weight: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    norm_eps: float,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """The first half of a Llama MLP: RMSNorm, gate and up, SwiGLU.

    out = SiLU(x̂ W_gᵀ) ⊙ (x̂ W_uᵀ),    x̂ = x / √(mean x² + norm_eps) ⊙ norm_weight

    Args:
        rows: x, ``[..., H]``, any float dtype.
        norm_weight: ``[H]``, dtype and device of `rows`, like all weights.
        gate: W_g, ``[O, H]``.
        up: W_u, ``[O, H]``.
        norm_eps: added to the mean square.
        backend: as for `norm_linear`.

    Returns: ``[..., O]``. Differentiable, but not with Triton, which rounds once, at the end.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
    """
    inputs = _check_rows(rows, norm_weight, {"gate": gate, "up": up})
    check_shape("up", up, gate.shape, "the shape of gate")
    obstacle = _obstacle(rows, len(gate), norm_weight, gate, up)
    arguments = (inputs, norm_weight, gate, up, norm_eps)
    match resolve(backend, "norm_swiglu", rows, obstacle=obstacle):
        case Backend.REFERENCE:
            out = norm_swiglu_reference(*arguments)
        case Backend.TRITON:
            from calm_kernels.norm_linear.function import norm_swiglu_triton

            out = norm_swiglu_triton(*arguments)
        case _:
            out = norm_swiglu_eager(*arguments)
    return out.view(*rows.shape[:-1], out.shape[-1])


def linear_residual(
    rows: Tensor, weight: Tensor, residual: Tensor, *, backend: Backend | str = Backend.AUTO
) -> Tensor:
    """A linear layer without bias, added to the residual stream.

    out = residual + x Wᵀ

    Args:
        rows: x, ``[..., H]``, any float dtype.
        weight: W, ``[O, H]``, dtype and device of `rows`.
        residual: ``[..., O]``, likewise.
        backend: as for `norm_linear`.

    Returns: ``[..., O]``, new memory. Differentiable, but not with Triton, which rounds once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
    """
    inputs = _check_rows(rows, None, {"weight": weight})
    _check_other("residual", residual, rows)
    check_shape("residual", residual, (*rows.shape[:-1], len(weight)), "[..., O]")
    arguments = (inputs, weight, residual.reshape(-1, len(weight)))
    obstacle = _obstacle(rows, len(weight), weight, residual=residual)
    match resolve(backend, "linear_residual", rows, obstacle=obstacle):
        case Backend.REFERENCE:
            out = linear_residual_reference(*arguments)
        case Backend.TRITON:
            from calm_kernels.norm_linear.function import linear_residual_triton

            out = linear_residual_triton(*arguments)
        case _:
            out = linear_residual_eager(*arguments)
    return out.view(residual.shape)


def _check_rows(rows: Tensor, norm_weight: Tensor | None, weights: dict[str, Tensor]) -> Tensor:
    """`rows` as ``[R, H]``."""
    check_tensor("rows", rows, min_dim=1)
    check_dtype("rows", rows)
    width = rows.shape[-1]
    if width == 0:
        raise ValueError(f"rows must have at least one feature, got shape {tuple(rows.shape)}")
    if norm_weight is not None:
        _check_other("norm_weight", norm_weight, rows)
        check_shape("norm_weight", norm_weight, (width,), "one factor a feature of rows")
    for name, weight in weights.items():
        _check_other(name, weight, rows, min_dim=2)
        check_shape(name, weight, (weight.shape[0], width), "outputs, each as wide as rows")
        if weight.shape[0] == 0:
            raise ValueError(f"{name} must have at least one row, got {tuple(weight.shape)}")
    return rows.reshape(-1, width)


def _check_other(name: str, tensor: Tensor, rows: Tensor, *, min_dim: int = 1) -> None:
    check_tensor(name, tensor, min_dim=min_dim)
    check_dtype(name, tensor, (rows.dtype,))
    check_device(name, tensor, "rows", rows)


def _obstacle(
    rows: Tensor, num_outputs: int, *weights: Tensor, residual: Tensor | None = None
) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if rows.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {rows.dtype}"
    if not all(weight.is_contiguous() for weight in weights):
        return "takes contiguous weights"
    if any(weight.numel() >= MAX_ELEMENTS for weight in weights):
        return "takes weights of less than 2^31 elements"
    if max(rows.numel(), rows.numel() // rows.shape[-1] * num_outputs) >= MAX_ELEMENTS:
        return "takes rows and outputs of less than 2^31 elements"
    needed = (rows, *weights) if residual is None else (rows, *weights, residual)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needed):
        return "has no gradient, and one is needed"
    return None
