"""The draws as one custom op for torch.compile; nothing here is differentiable."""

import torch
from torch import Tensor

from calm_kernels.operators import operator
from calm_kernels.softmax_draws.kernels import write_tokens

__all__ = ["softmax_draws_triton"]


def softmax_draws_triton(
    logits: Tensor, uniforms: Tensor | None, seed: Tensor | None, num_draws: int, stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens ``[R, N]`` and finiteness ``[R]``; see `calm_kernels.softmax_draws`."""
    if uniforms is not None:
        uniforms, num_draws = uniforms.contiguous(), uniforms.shape[1]
    if seed is not None:
        seed = seed.contiguous()
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    return _draws_op(rows, uniforms, seed, num_draws, stream, temperature)


@operator("softmax_draws")
def _draws_op(
    logits: Tensor,
    uniforms: Tensor | None,
    seed: Tensor | None,
    num_draws: int,
    stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Uniforms that are given, or drawn from the seed."""
    tokens, is_finite = _outputs(logits, num_draws)
    if len(logits):
        with torch.cuda.device_of(logits):
            write_tokens(logits, uniforms, seed, stream, temperature, tokens, is_finite)
    return tokens, is_finite


def _outputs(logits: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    rows = len(logits)
    return (
        logits.new_empty(rows, num_draws, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
    )


@_draws_op.register_fake
def _(
    logits: Tensor, uniforms: Tensor | None, seed: Tensor | None, num_draws: int, stream: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(logits, num_draws)
