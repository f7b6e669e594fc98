"""The public function: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.autograd import without_autocast
from calm_kernels.backend import Backend, resolve
from calm_kernels.linear_argmax.eager import linear_argmax_eager
from calm_kernels.linear_argmax.reference import linear_argmax_reference
from calm_kernels.precision import check_projection

__all__ = ["linear_argmax"]


def linear_argmax(
    hidden: Tensor,
    weight: Tensor,
    *,
    return_max: bool = False,
    return_logsumexp: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor | tuple[Tensor, ...]:
    """Index of the largest entry of ``hidden @ weight.T`` in each row.

    index = argmax_v Σ_h hidden[..., h] weight[v, h]

    Args:
        hidden: ``[..., H]``, any float dtype.
        weight: ``[V, H]``, V >= 1, same dtype (under autocast both are cast) and device.
        return_max: also the largest entry.
        return_logsumexp: also log Σ_v exp, so that ``(max - logsumexp).exp()`` is the probability
            of the index.
        backend: ``auto``, ``reference``, ``torch`` or ``triton`` (no float64).

    Returns: index ``[...]`` int64 alone, or a tuple (index, max if asked for, logsumexp if asked
        for), the latter two ``[...]`` in float32 (float64 for float64). As for `torch.argmax`, the
        first of equal entries wins, and a NaN counts as the largest. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Source: CALM, section 3.3.3 (the autoencoder's decoder). Cost: 2 V H flops a row. The torch
        backend holds one block of logits at a time, never ``[rows, V]``; the kernels none at all.
        Half-precision inputs are multiplied and summed in float32, and so is float32 (as
        three tf32 matmuls on NVIDIA GPUs, which together are as accurate).
    """
    dtype = check_projection(hidden, weight)
    chosen = resolve(backend, "linear_argmax", hidden, obstacle=_obstacle(dtype))

    arguments = (
        hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype), weight.detach(), return_logsumexp
    )  # fmt: skip
    with without_autocast(hidden):
        match chosen:
            case Backend.REFERENCE:
                index, largest, logsumexp = linear_argmax_reference(*arguments)
            case Backend.TRITON:
                from calm_kernels.linear_argmax.function import linear_argmax_triton

                index, largest, logsumexp = linear_argmax_triton(*arguments)
            case _:
                index, largest, logsumexp = linear_argmax_eager(*arguments)
    lead = hidden.shape[:-1]
    results = [index.view(lead)]
    if return_max:
        results.append(largest.view(lead))
    if logsumexp is not None:
        results.append(logsumexp.view(lead))
    return results[0] if len(results) == 1 else tuple(results)


def _obstacle(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take this dtype, None if they can."""
    return "computes in float32 and takes no float64 input" if dtype == torch.float64 else None
