"""Linear layers of a decoder for few rows, with the work around them fused in."""

from calm_kernels.norm_linear.api import linear_residual, norm_linear, norm_swiglu

__all__ = ["linear_residual", "norm_linear", "norm_swiglu"]
