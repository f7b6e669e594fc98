"""The public function: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.autograd import without_autocast
from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor
from calm_kernels.linear_cross_entropy.eager import linear_cross_entropy_eager
from calm_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from calm_kernels.precision import check_projection

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against `labels`.

    loss = mean_r (log Σ_v exp(logit_rv) - logit_{r, label_r}) over label_r ≠ ignore_index

    Args:
        hidden: ``[..., H]``, any float dtype; differentiable.
        weight: ``[V, H]``, same dtype (under autocast both are cast) and device; differentiable.
        labels: ``[...]`` int64, in [0, V) or `ignore_index`.
        ignore_index: label of a row that is skipped.
        backend: ``auto``, ``reference``, ``torch`` or ``triton`` (no float64).

    Returns: scalar in float32 (float64 for float64). As `torch.nn.functional.cross_entropy` it is
        NaN, with zero gradients, where no label counts.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape; on the CPU
            also a label out of range. On a GPU such a label fails an assertion of the torch backend
            and makes the loss of the Triton backend NaN.

    Source: CALM, section 2.1 (reconstruction loss). Cost: three matmuls, one if no gradient is
        needed. Torch and Triton hold the logits of one block of rows at a time, never
        ``[rows, V]``, and compute the gradients in the forward pass; they have no second derivative
        and do not synchronise a GPU. Half-precision inputs are multiplied and summed in float32,
        logits and their gradients kept in float32 (Triton: in the dtype of the inputs).
    """
    dtype = check_projection(hidden, weight)
    check_tensor("labels", labels)
    check_dtype("labels", labels, (torch.int64,))
    check_shape("labels", labels, hidden.shape[:-1], "one per row of hidden")
    check_device("labels", labels, "hidden", hidden)
    _check_range(labels, weight.shape[0], ignore_index)
    chosen = resolve(backend, "linear_cross_entropy", hidden, obstacle=_obstacle(dtype))

    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    arguments = (rows, weight, labels, ignore_index, dtype)
    with without_autocast(hidden):
        match chosen:
            case Backend.REFERENCE:
                return linear_cross_entropy_reference(*arguments)
            case Backend.TRITON:
                from calm_kernels.linear_cross_entropy.function import linear_cross_entropy_triton

                return linear_cross_entropy_triton(*arguments)
            case _:
                return linear_cross_entropy_eager(*arguments)


def _obstacle(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take this dtype, None if they can."""
    return "computes in float32 and takes no float64 input" if dtype == torch.float64 else None


def _check_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """On the CPU, where reading costs nothing; a GPU's gather asserts on the device."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if is_wrong.any():
        found = int(labels[is_wrong][0])
        raise ValueError(f"labels must lie in [0, {vocab_size}) or be {ignore_index}; got {found}")
