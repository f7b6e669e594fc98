"""The dtype of a matmul with a weight, and the dtype of its sums."""

import torch
from torch import Tensor

from calm_kernels.autograd import is_autocast_on
from calm_kernels.checks import check_device, check_dtype, check_shape, check_tensor

__all__ = ["accumulation_dtype", "check_projection", "matmul_dtype", "round_operand"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: where sums, exponentials and logarithms are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` rounded to the `dtype` of a matmul, in the dtype of its sums."""
    return tensor.to(dtype).to(accumulation_dtype(dtype))


def matmul_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 stays float64), else the one both tensors share.

    Raises:
        TypeError: the dtypes differ and autocast is off.
    """
    device = tensor.device.type
    if is_autocast_on(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}; got {tensor.dtype}"
        )
    return tensor.dtype


def check_projection(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """`matmul_dtype` of ``hidden [..., H] @ weight [V, H].T``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, device or shape, or an empty vocabulary.
    """
    check_tensor("hidden", hidden, min_dim=1)
    check_tensor("weight", weight, min_dim=2)
    check_dtype("hidden", hidden)
    check_dtype("weight", weight)
    check_shape("weight", weight, (weight.shape[0], hidden.shape[-1]), "V rows as wide as hidden")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got shape {tuple(weight.shape)}")
    check_device("weight", weight, "hidden", hidden)
    return matmul_dtype("weight", weight, "hidden", hidden)
