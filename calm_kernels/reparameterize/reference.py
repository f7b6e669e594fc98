"""Reparameterization as the paper writes it (CALM, sections 2.1 and 2.2)."""

import torch
from torch import Tensor

from calm_kernels.precision import accumulation_dtype

__all__ = ["reparameterize_reference"]


def reparameterize_reference(
    latent_states: Tensor,  # [..., 2L]
    epsilon: Tensor,  # [..., L]
    keep: Tensor | None,  # [..., L] bool
    kl_floor: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Latent ``[..., L]`` and KL divergence ``[...]``; see `calm_kernels.reparameterize`."""
    states = latent_states.to(accumulation_dtype(latent_states.dtype))
    mean, log_std = states.chunk(2, dim=-1)
    std = torch.exp(log_std)
    latent = mean + std * epsilon
    if keep is not None:
        latent = latent * keep / (1.0 - dropout)
    kl = 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * log_std)
    return latent.to(latent_states.dtype), torch.clamp(kl, min=kl_floor).sum(dim=-1)
