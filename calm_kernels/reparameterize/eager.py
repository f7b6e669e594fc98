"""The torch backend: one autograd function with closed gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from calm_kernels.precision import accumulation_dtype

__all__ = ["reparameterize_eager"]


def reparameterize_eager(
    latent_states: Tensor,  # [..., 2L]
    epsilon: Tensor,  # [..., L]
    keep: Tensor | None,  # [..., L] bool
    kl_floor: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Latent ``[..., L]`` and KL divergence ``[...]``; see `calm_kernels.reparameterize`."""
    return _Reparameterize.apply(latent_states, epsilon, keep, kl_floor, dropout)


class _Reparameterize(Function):
    """Keeps `latent_states`, ε and the kept elements; exp and the KL are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        latent_states: Tensor,
        epsilon: Tensor,
        keep: Tensor | None,
        kl_floor: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        mean, log_std = _moments(latent_states)
        std = torch.exp(log_std)
        latent = _drop(torch.addcmul(mean, std, epsilon), keep, dropout)
        kl = _divergence(mean, log_std, std).clamp_(min=kl_floor).sum(dim=-1)
        ctx.save_for_backward(latent_states, epsilon, keep)
        ctx.kl_floor, ctx.dropout = kl_floor, dropout
        return latent.to(latent_states.dtype), kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlatent: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        latent_states, epsilon, keep = ctx.saved_tensors
        mean, log_std = _moments(latent_states)
        std = torch.exp(log_std)
        is_free = _divergence(mean, log_std, std) >= ctx.kl_floor  # torch.clamp's convention
        dkl = dkl[..., None] * is_free
        dlatent = _drop(dlatent.to(mean.dtype), keep, ctx.dropout)
        dmean = torch.addcmul(dlatent, dkl, mean)
        dlog_std = dlatent * epsilon * std + dkl * (std * std - 1.0)
        dstates = torch.cat([dmean, dlog_std], dim=-1).to(latent_states.dtype)
        return dstates, None, None, None, None


def _moments(latent_states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log_std, ``[..., L]`` each, in the dtype of the sums."""
    states = latent_states.to(accumulation_dtype(latent_states.dtype))
    mean, log_std = states.chunk(2, dim=-1)
    return mean, log_std


def _divergence(mean: Tensor, log_std: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(0, 1)) per dimension."""
    return 0.5 * (mean * mean + std * std - 1.0) - log_std


def _drop(latent: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return latent if keep is None else latent * keep * (1.0 / (1.0 - dropout))
