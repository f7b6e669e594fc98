"""The public function: check, choose, call."""

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor
from calm_kernels.linear_argmax.eager import linear_argmax_eager
from calm_kernels.linear_argmax.reference import linear_argmax_reference
from calm_kernels.precision import product_dtype

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
        backend: ``auto``, ``reference`` or ``torch``.

    Returns: index ``[...]`` int64 alone, or a tuple (index, max if asked for, logsumexp if asked
        for), the latter two ``[...]`` in float32 (float64 for float64). As for `torch.argmax`, the
        first of equal entries wins, and a NaN counts as the largest. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Source: CALM, section 3.3.3 (the autoencoder's decoder). Cost: 2 V H flops a row; the torch
        backend holds one block of logits at a time, never ``[rows, V]``. Half-precision inputs are
        multiplied exactly and summed in float32.
    """
    check_tensor("hidden", hidden, min_dim=1)
    check_tensor("weight", weight, min_dim=2)
    check_dtype("hidden", hidden)
    check_dtype("weight", weight)
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]), "V rows as wide as hidden")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row, got shape " + str(tuple(weight.shape)))
    check_device("weight", weight, "hidden", hidden)
    dtype = product_dtype("weight", weight, "hidden", hidden)
    chosen = resolve(backend, "linear_argmax", hidden)

    implementation = linear_argmax_reference if chosen is Backend.REFERENCE else linear_argmax_eager
    rows = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        index, largest, logsumexp = implementation(rows, weight.detach(), return_logsumexp)
    lead = hidden.shape[:-1]
    results = [index.view(lead)]
    if return_max:
        results.append(largest.view(lead))
    if logsumexp is not None:
        results.append(logsumexp.view(lead))
    return results[0] if len(results) == 1 else tuple(results)
