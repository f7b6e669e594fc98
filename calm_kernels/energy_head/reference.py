"""The head as published: hidden states repeated for every draw, halves joined before a matmul."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["energy_head_reference"]

NORM_EPS = 1e-6


def energy_head_reference(
    hidden: Tensor,  # [R, C]
    noise: Tensor,  # [N, R, Z]
    named: Mapping[str, Tensor],
    recompute: bool,
) -> Tensor:
    """Latents ``[N, R, L]``; see `calm_kernels.energy_head`."""
    hidden = hidden.repeat(noise.shape[0], 1, 1)  # [N, R, C]
    sample = _norm(_linear(noise.to(hidden.dtype), named, "noise_embd"), named, "norm_noise")
    context = _norm(_linear(hidden, named, "hidden_embd"), named, "norm_hidden")
    block = 0
    while f"mlp_blocks.{block}.in_ln.weight" in named:
        arguments = (sample, context, named, f"mlp_blocks.{block}")
        if recompute:
            sample = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sample = _block(*arguments)
        block += 1
    features = _linear(_norm(sample, named, "final_layer.in_ln"), named, "final_layer.linears.0")
    return _linear(F.silu(features), named, "final_layer.linears.2")


def _block(sample: Tensor, context: Tensor, named: Mapping[str, Tensor], name: str) -> Tensor:
    features = torch.cat([_norm(sample, named, f"{name}.in_ln"), context], dim=-1)  # [N, R, 2C]
    features = F.silu(_linear(features, named, f"{name}.linears.0"))
    features = F.silu(_linear(features, named, f"{name}.linears.2"))
    gate, up = _linear(features, named, f"{name}.linears.4").chunk(2, dim=-1)
    return sample + _linear(F.silu(gate) * up, named, f"{name}.down_proj")


def _linear(values: Tensor, named: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(values, named[f"{name}.weight"], named[f"{name}.bias"])


def _norm(values: Tensor, named: Mapping[str, Tensor], name: str) -> Tensor:
    weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
    return F.layer_norm(values, values.shape[-1:], weight, bias, eps=NORM_EPS)
