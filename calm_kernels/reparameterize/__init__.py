"""Posterior draw and clipped KL divergence of the autoencoder."""

from calm_kernels.reparameterize.api import reparameterize

__all__ = ["reparameterize"]
