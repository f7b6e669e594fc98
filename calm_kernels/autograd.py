"""What operations with hand-written gradients share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "is_autocast_on",
    "once_differentiable",
    "refuse_second_derivative",
    "without_autocast",
]


def refuse_second_derivative(
    operation: str, advice: str = '; backend="reference" has a second derivative'
) -> None:
    """Raise inside a backward pass with ``create_graph=True``: stored values would be constants.

    Args:
        operation: its name, which begins the message.
        advice: ends the message.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation} is differentiable once, create_graph=True is refused{advice}"
        )


def once_differentiable(result: Tensor, operation: str) -> Tensor:
    """`result`, whose backward pass refuses ``create_graph=True``; torch.compile refuses by itself.

    For a formula in plain autograd whose second derivative would be NaN.
    """
    if result.requires_grad and not torch.compiler.is_compiling():
        result.register_hook(lambda _: refuse_second_derivative(operation, advice=""))
    return result


def is_autocast_on(device: str) -> bool | None:
    """Whether autocast is on for a type of device; None where there is no autocast at all."""
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # torch.amp.is_autocast_available would say so, but Dynamo cannot trace it
        return None


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context without autocast on the device of `tensor`: operations keep their dtypes."""
    device = tensor.device.type
    if is_autocast_on(device) is None:
        return nullcontext()
    return torch.autocast(device, enabled=False)
