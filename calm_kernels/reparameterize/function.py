"""Launches the reparameterization's kernels and teaches autograd and torch.compile about them."""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.noise import as_first_row
from calm_kernels.operators import operator
from calm_kernels.reparameterize.kernels import write_gradient, write_latents

__all__ = ["reparameterize_triton"]


def reparameterize_triton(
    latent_states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    kl_floor: float,
    dropout: float,
    seed: Tensor | None,
    first_row: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Latent ``[..., L]`` and KL divergence ``[...]``; what is not given is drawn in the kernel.

    Args:
        latent_states: ``[..., 2L]``.
        noise: ε, ``[..., L]`` or None.
        keep: bool, ``[..., L]`` or None.
        kl_floor: λ_KL.
        dropout: chance that an element is dropped.
        seed: of `noise.as_seed`; None where all is given.
        first_row: global index of the first row.
    """
    *batch, width = latent_states.shape
    width //= 2
    if seed is not None:
        seed = seed.contiguous()
        first_row = as_first_row(first_row, seed.device)
    latent, kl = _forward_op(
        latent_states.reshape(-1, 2 * width),
        None if noise is None else noise.reshape(-1, width),
        None if keep is None else keep.reshape(-1, width),
        seed, None if seed is None else first_row, kl_floor, dropout,
    )  # fmt: skip
    return latent.view(*batch, width), kl.view(batch)


@operator("reparameterize")
def _forward_op(
    states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    seed: Tensor | None,
    first_row: Tensor | None,
    kl_floor: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Latent ``[R, L]`` and KL ``[R]`` of states ``[R, 2L]``."""
    latent, kl = _forward_outputs(states)
    if len(states):
        write_latents(
            states, noise, keep, seed, first_row, latent, kl, kl_floor=kl_floor, dropout=dropout
        )
    return latent, kl


@operator("reparameterize_backward")
def _backward_op(
    states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    seed: Tensor | None,
    first_row: Tensor | None,
    dlatent: Tensor,
    dkl: Tensor,
    kl_floor: float,
    dropout: float,
) -> Tensor:
    """Gradient ``[R, 2L]`` of the states."""
    dstates = states.new_empty(states.shape)
    if len(states):
        write_gradient(
            states, noise, keep, seed, first_row, dlatent, dkl, dstates, kl_floor=kl_floor,
            dropout=dropout,
        )  # fmt: skip
    return dstates


def _forward_outputs(states: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = states.shape
    return states.new_empty(num_rows, width // 2), states.new_empty(num_rows, dtype=torch.float32)


@_forward_op.register_fake
def _(states: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward_outputs(states)


@_backward_op.register_fake
def _(states: Tensor, *options: Any) -> Tensor:
    return states.new_empty(states.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the states and where the draws came from, not the draws."""
    *tensors, ctx.kl_floor, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dlatent: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("reparameterize")
    dstates = _backward_op(*ctx.saved_tensors, dlatent, dkl, ctx.kl_floor, ctx.dropout)
    return dstates, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_save)
