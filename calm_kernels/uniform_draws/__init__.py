"""Addressed draws from the uniform and the normal distribution."""

from calm_kernels.uniform_draws.api import normal_draws, uniform_draws

__all__ = ["normal_draws", "uniform_draws"]
