"""The public function: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.autograd import without_autocast
from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_fraction, check_shape, check_tensor
from calm_kernels.linear_cross_entropy.eager import linear_cross_entropy_eager
from calm_kernels.linear_cross_entropy.recompute import linear_cross_entropy_recompute
from calm_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from calm_kernels.precision import check_projection

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    recompute: bool = False,
    negligible: float = 0.0,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against `labels`.

    loss = mean_r (log Σ_v exp(logit_rv) - logit_{r, label_r}) over label_r ≠ ignore_index

    Args:
        hidden: ``[..., H]``, any float dtype; differentiable.
        weight: ``[V, H]``, same dtype (under autocast both are cast) and device; differentiable.
        labels: ``[...]`` int64, in [0, V) or `ignore_index`.
        ignore_index: label of a row that is skipped.
        recompute: keep a log-sum-exp a row for the backward pass, which computes the logits again,
            instead of both gradients. The reference keeps all logits either way.
        negligible: with `recompute`, in [0, 1): entries of softmax - onehot that are smaller in
            absolute value count as zero in the gradients. On a CPU blocks without others are
            skipped. Cut Cross-Entropy takes 2^-12 for bfloat16; 0 is exact.
        backend: ``auto``, ``reference``, ``torch`` or ``triton`` (no float64, no `recompute`).

    Returns: scalar in float32 (float64 for float64). As `torch.nn.functional.cross_entropy` it is
        NaN, with zero gradients, where no label counts.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range; on the
            CPU also a label out of range. On a GPU such a label fails an assertion of the torch
            backend and makes the loss of the Triton backend NaN.

    Source: CALM, section 2.1 (reconstruction loss); `recompute`: Cut Cross-Entropy,
        arXiv 2411.09009. Cost: three matmuls, one if no gradient is needed; with `recompute` four,
        or two where all blocks are skipped. Torch and Triton hold the logits of one block of rows
        at a time, never ``[rows, V]``, and without `recompute` compute the gradients in the forward
        pass; they have no second derivative and do not synchronise a GPU. Half-precision inputs are
        multiplied and summed in float32, logits and their gradients kept in float32 (Triton: in the
        dtype of the inputs).
    """
    dtype = check_projection(hidden, weight)
    check_tensor("labels", labels)
    check_dtype("labels", labels, (torch.int64,))
    check_shape("labels", labels, hidden.shape[:-1], "one per row of hidden")
    check_device("labels", labels, "hidden", hidden)
    _check_range(labels, weight.shape[0], ignore_index)
    check_fraction("negligible", negligible)
    if negligible > 0.0 and not recompute:
        raise ValueError(f"negligible needs recompute=True, got negligible={negligible} without it")
    obstacle = _obstacle(dtype, recompute)
    chosen = resolve(backend, "linear_cross_entropy", hidden, obstacle=obstacle)

    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    arguments = (rows, weight, labels, ignore_index, dtype)
    with without_autocast(hidden):
        match chosen:
            case Backend.REFERENCE:
                return linear_cross_entropy_reference(*arguments, negligible)
            case Backend.TRITON:
                from calm_kernels.linear_cross_entropy.function import linear_cross_entropy_triton

                return linear_cross_entropy_triton(*arguments)
            case _ if recompute:
                return linear_cross_entropy_recompute(*arguments, negligible)
            case _:
                return linear_cross_entropy_eager(*arguments)


def _obstacle(dtype: torch.dtype, recompute: bool) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if recompute:
        return "has no form that recomputes logits"
    return "computes in float32 and takes no float64 input" if dtype == torch.float64 else None


def _check_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """On the CPU, where reading costs nothing; a GPU's gather asserts on the device."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if is_wrong.any():
        found = int(labels[is_wrong][0])
        raise ValueError(f"labels must lie in [0, {vocab_size}) or be {ignore_index}; got {found}")
