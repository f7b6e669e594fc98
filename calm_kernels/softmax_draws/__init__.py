"""Tokens drawn from the softmax of their logits."""

from calm_kernels.softmax_draws.api import softmax_draws
from calm_kernels.softmax_draws.eager import draw_tokens

__all__ = ["draw_tokens", "softmax_draws"]
