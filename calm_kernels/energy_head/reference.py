"""The head as published: hidden states repeated for every draw, both halves joined before the first linear."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calm_kernels.energy_head.parameters import BlockParameters, HeadParameters, Pair

__all__ = ["energy_head_reference"]

NORM_EPS = 1e-6


def energy_head_reference(
    hidden: Tensor,  # [R, C]
    noise: Tensor,  # [N, R, Z]
    head: HeadParameters,
    recompute: bool,
) -> Tensor:
    """Latents ``[N, R, L]``; see `calm_kernels.energy_head`."""
    hidden = hidden.repeat(noise.shape[0], 1, 1)  # [N, R, C]
    sample = _norm(F.linear(noise.to(hidden.dtype), *head.noise_embd), head.norm_noise)
    context = _norm(F.linear(hidden, *head.hidden_embd), head.norm_hidden)
    for block in head.blocks:
        if recompute:
            sample = checkpoint(_block, sample, context, block, use_reentrant=False)
        else:
            sample = _block(sample, context, block)
    features = F.silu(F.linear(_norm(sample, head.final_norm), *head.final_first))
    return F.linear(features, *head.final_second)


def _block(sample: Tensor, context: Tensor, block: BlockParameters) -> Tensor:
    joined = torch.cat([_norm(sample, block.norm), context], dim=-1)  # [N, R, 2C]
    features = F.silu(F.linear(joined, *block.first))
    features = F.silu(F.linear(features, *block.second))
    gate, up = F.linear(features, *block.gate_up).chunk(2, dim=-1)
    return sample + F.linear(F.silu(gate) * up, *block.down)


def _norm(values: Tensor, norm: Pair) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], *norm, eps=NORM_EPS)
