"""The torch backend: one autograd function with closed gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from calm_kernels.autograd import refuse_second_derivative
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
    factor = None if keep is None else keep.to(epsilon.dtype).div_(1.0 - dropout)
    return _Reparameterize.apply(latent_states, epsilon, factor, kl_floor)


class _Reparameterize(Function):
    """Keeps its inputs for the backward pass; exp and the KL are cheap to compute again."""

    @staticmethod
    def forward(
        ctx: Any,
        latent_states: Tensor,
        epsilon: Tensor,
        factor: Tensor | None,
        kl_floor: float,
    ) -> tuple[Tensor, Tensor]:
        mean, log_std = _moments(latent_states)
        std = log_std.exp()
        # Out of place, and no empty conversion: torch.compile of torch 2.11 loses the gradient of
        # an output that is either.
        latent = torch.addcmul(mean, std, epsilon)
        if factor is not None:
            latent = latent * factor
        if latent.dtype != latent_states.dtype:
            latent = latent.to(latent_states.dtype)
        kl = _divergence(mean, log_std, std).clamp_(min=kl_floor).sum(dim=-1)
        ctx.save_for_backward(latent_states, epsilon, factor)
        ctx.kl_floor = kl_floor
        return latent, kl

    @staticmethod
    def backward(ctx: Any, dlatent: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("reparameterize")
        latent_states, epsilon, factor = ctx.saved_tensors
        mean, log_std = _moments(latent_states)
        std = log_std.exp()
        is_free = _divergence(mean, log_std, std) >= ctx.kl_floor  # the convention of torch.clamp
        dkl = torch.where(is_free, dkl[..., None], 0.0)
        dlatent = dlatent.to(mean.dtype)
        if factor is not None:
            dlatent = dlatent * factor
        dmean = torch.addcmul(dlatent, dkl, mean)
        dlog_std = (dlatent * epsilon).mul_(std).addcmul_(dkl, std * std - 1.0)
        dstates = torch.cat([dmean, dlog_std], dim=-1).to(latent_states.dtype)
        return dstates, None, None, None


def _moments(latent_states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log_std, ``[..., L]`` each, in the dtype of the sums."""
    states = latent_states.to(accumulation_dtype(latent_states.dtype))
    mean, log_std = states.chunk(2, dim=-1)
    return mean, log_std


def _divergence(mean: Tensor, log_std: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(0, 1)) of each dimension."""
    return (mean * mean).addcmul_(std, std).sub_(1.0).mul_(0.5).sub_(log_std)
