"""Functions of tensors that torch sees as one operator, with a gradient where there is one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

__all__ = ["Operator", "is_traced", "operator"]


class Operator:
    """A function as the custom operator ``calm_kernels::name``, without its cost in plain calls.

    torch takes 20 µs of the host to dispatch a custom operator, 60 if it has a gradient. Only
    torch.compile and modes that see every operator (fake tensors, make_fx) need it: a plain call
    runs the function itself, inside an autograd function if it has a gradient.

    Args:
        name: of the operator.
        function: its implementation, annotated; outputs share no memory with inputs.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._operator = torch.library.custom_op(f"calm_kernels::{name}", function, mutates_args=())
        self._function = self._plain = function

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What has the shapes and dtypes of the results, see `torch.library.register_fake`."""
        return self._operator.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """The gradient, see `torch.library.register_autograd`; inputs and outputs are not lists."""
        self._operator.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        differentiable: Any = type(function.__name__, (Function,), methods)
        self._plain = differentiable.apply

    def __call__(self, *inputs: Any) -> Any:
        """The function's results."""
        if is_traced():
            return self._operator(*inputs)
        return self._plain(*inputs) if torch.is_grad_enabled() else self._function(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes an `Operator` of a function."""
    return lambda function: Operator(name, function)


def is_traced() -> bool:
    """Whether torch.compile or a mode wants to see the operator instead of what is inside."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
