"""The formula, in float64."""

import torch
from torch import Tensor

__all__ = ["softmax_draws_reference"]


def softmax_draws_reference(
    logits: Tensor, uniforms: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens ``[R, N]`` and finiteness ``[R]``; see `calm_kernels.softmax_draws`."""
    scaled = logits.float() / (temperature or 1.0)
    is_finite = torch.isfinite(scaled).all(-1)
    tokens = torch.empty(uniforms.shape, dtype=torch.int64, device=logits.device)
    for row, values in enumerate(scaled.to(torch.float64)):
        reached = values.softmax(-1).cumsum(-1)
        for draw, uniform in enumerate(uniforms[row]):
            if temperature > 0:
                tokens[row, draw] = (reached <= uniform * reached[-1]).sum()
            else:
                tokens[row, draw] = values.argmax()
    return tokens.clamp(max=logits.shape[-1] - 1), is_finite
