"""The torch backend: probabilities of all tokens, then the inverse of their cumulative sums."""

import torch
from torch import Tensor

__all__ = ["draw_tokens", "softmax_draws_eager"]


def softmax_draws_eager(
    logits: Tensor, uniforms: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens ``[R, N]`` and finiteness ``[R]``; see `calm_kernels.softmax_draws`."""
    scaled = logits.to(torch.float32)
    if temperature > 0:
        scaled = scaled / temperature
        tokens = draw_tokens(scaled.softmax(-1), uniforms)
    else:
        tokens = scaled.argmax(-1, keepdim=True).expand(uniforms.shape)
    return tokens, torch.isfinite(scaled).all(-1)


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens drawn by the inverse of the cumulative distribution.

    Args:
        probabilities: ``[R, V]``. They are summed in float64, so that the last of 1e5 terms counts.
        uniforms: N draws for each row from the uniform distribution on [0, 1), float64 ``[R, N]``.

    Returns: int64 ``[R, N]``.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # right=True never returns a token of probability 0; rounding may lead past the last token.
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return tokens.clamp(max=probabilities.shape[-1] - 1)
