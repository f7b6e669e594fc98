"""Seeds of sequences, chunks and waves; plain draws: hidden state -> head -> latents -> tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm.errors import UserError
from calm.models.continuous import ContinuousTransformer
from calm_kernels.noise import Seed, Stream, as_seed, philox

__all__ = ["ROUND_STRIDE", "advance", "draw_latents", "draw_patches", "sequence_seeds"]

WORD = 0xFFFFFFFF
ROUND_STRIDE = 2**40  # waves of one chunk draw from disjoint ranges of the seed's offset


def draw_latents(
    model: ContinuousTransformer,
    hidden: Tensor,
    *,
    num_samples: int,
    seed: Tensor,
    noise_scale: float = 1.0,
) -> Tensor:
    """N independent draws of the latent of the chunk that follows each hidden state.

    Args:
        model: a CALM.
        hidden: backbone states ``[..., H]``.
        num_samples: N >= 1.
        seed: int64 ``[2]``, or ``[rows, 2]`` with a stream for each row of `hidden`.
        noise_scale: factor on the head's noise; 0 is deterministic.

    Returns: latents ``[N, ..., L]``.
    Raises:
        UserError: the head gave a latent that is not finite.
    """
    latents = model.generative_head.sample(
        hidden, num_samples=num_samples, seed=seed, noise_scale=noise_scale
    )
    if not torch.isfinite(latents).all():
        raise UserError(
            "the head drew latents that are not finite: the weights are damaged or training "
            "diverged; load an earlier checkpoint"
        )
    return latents


def draw_patches(
    model: ContinuousTransformer,
    hidden: Tensor,
    *,
    num_samples: int,
    seed: Tensor,
    noise_scale: float = 1.0,
) -> Tensor:
    """Token ids ``[N, ..., K]`` of `draw_latents`, all decoded."""
    return model.decode_latents(
        draw_latents(model, hidden, num_samples=num_samples, seed=seed, noise_scale=noise_scale)
    )


def sequence_seeds(seed: Seed | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """One seed for each sequence, int64 ``[B, 2]`` of (seed, offset).

    A list gives them. One seed for the batch is that of row 0; row b > 0 gets 64 bits of Philox
    with the seed as key and b as counter, so that neighbouring seeds share no stream.

    Args:
        seed: see `calm_kernels.noise.as_seed`, or a list of B ints.
        batch: B.
        device: where draws are made.
    """
    if isinstance(seed, Sequence):
        if len(seed) != batch:
            raise UserError(f"seed must hold one number per sequence, {batch}; got {len(seed)}")
        for number in seed:
            if type(number) is not int or not -(2**63) <= number < 2**63:
                raise UserError(f"seed must hold whole numbers of 64 bits, got {number!r}")
        return as_seed(torch.tensor(seed, dtype=torch.int64)[:, None], device)
    common = as_seed(seed, device)
    if common.dim() == 2:
        if len(common) != batch:
            raise UserError(f"seed must hold one row per sequence, {batch}; got {len(common)}")
        return common
    if batch == 1:
        return common[None]
    value, offset = common.expand(batch, 2).unbind(1)
    row = torch.arange(batch, device=device)
    zero = torch.zeros_like(row)
    key = (value & WORD, ((value >> 32) & WORD) ^ int(Stream.SEQUENCE))
    low, high, *_ = philox((row, zero, zero, zero), key)
    return torch.stack([torch.where(row == 0, value, low | (high << 32)), offset], dim=1)


def advance(seed: Tensor, steps: int | Tensor) -> Tensor:
    """The seed `steps` further on: other draws, addressed by `steps` alone."""
    offset = seed[..., 1] + steps
    return torch.stack([seed[..., 0].expand_as(offset), offset], dim=-1)
