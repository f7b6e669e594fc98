"""Most likely token of a linear output layer, without its logits."""

from calm_kernels.linear_argmax.api import linear_argmax

__all__ = ["linear_argmax"]
