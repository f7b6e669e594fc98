"""In which dtype a matrix product runs, and in which one its sums are kept."""

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "product_dtype"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: where sums, exponentials and logarithms are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> torch.dtype:
    """The dtype of a product of two tensors: autocast's where it is on, else the dtype that both share.

    As for `torch.autocast` itself, float64 tensors are left alone.

    Raises:
        TypeError: the dtypes differ and autocast is off.
    """
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}; got {tensor.dtype}"
        )
    return tensor.dtype
