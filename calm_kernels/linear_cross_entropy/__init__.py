"""Cross-entropy of a linear output layer, without its logits."""

from calm_kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
