"""Argument checks shared by the operations.

Each error names the argument, what was expected and what came.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "check_device",
    "check_dtype",
    "check_exponent",
    "check_fraction",
    "check_int64",
    "check_integer",
    "check_shape",
    "check_tensor",
]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, *, min_dim: int = 0) -> Tensor:
    """`value` as a tensor of at least `min_dim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() < min_dim:
        raise ValueError(
            f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}"
        )
    return value


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """`tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}; got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str = "") -> None:
    """`tensor.shape` equals `expected`; `meaning` says where that shape comes from."""
    if tuple(tensor.shape) != tuple(expected):
        origin = f" ({meaning})" if meaning else ""
        raise ValueError(
            f"{name} must have shape {tuple(expected)}{origin}, got {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {tensor.device}"
        )


def check_exponent(exponent: float) -> float:
    """0 < exponent < 2, where the energy score is strictly proper."""
    if not 0.0 < exponent < 2.0:
        raise ValueError(f"exponent must lie in (0, 2), exclusive; got {exponent}")
    return float(exponent)


def check_fraction(name: str, value: float) -> float:
    """0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1); got {value}")
    return float(value)


def check_int64(name: str, value: int) -> int:
    """An integer of 64 bits, one of them for its sign."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return value


def check_integer(name: str, value: int, minimum: int) -> int:
    """An integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value
