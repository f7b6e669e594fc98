"""The network of the diffusion and flow heads: an MLP modulated by time and hidden state."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from calm.models.heads.base import is_recomputed

__all__ = ["Denoiser"]

NORM_EPS = 1e-6
TIME_CHANNELS = 256
MAX_PERIOD = 10000.0


class Denoiser(nn.Module):
    """Noisy latents, times and hidden states to a prediction.

    x₀ = W_x x,    y = time_embed(t) + W_h h,
    x ← x + gate(y) ⊙ MLP(LN(x) ⊙ (1 + scale(y)) + shift(y))    in each block,

    then a modulated linear; gate, scale and shift are linear in SiLU(y).

    Args:
        hidden_size: width d, that of the hidden states.
        in_channels: width of the latents.
        out_channels: width of the prediction.
        num_blocks: residual blocks.
        output_init: ``zero`` (published) or ``scaled``, N(0, 1 / d), for the last linear.
        recompute: keep the input of each block for the backward pass, and compute the rest again.

    Source: CALM, section 7.4 (heads compared); the design is that of masked autoregressive image
    models.
    """

    gradient_checkpointing = False  # which transformers sets; as `recompute`

    def __init__(
        self,
        hidden_size: int,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        output_init: Literal["zero", "scaled"] = "zero",
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.output_init = output_init
        self.time_embed = _TimeEmbedding(hidden_size)
        self.cond_embed = nn.Linear(hidden_size, hidden_size)
        self.input_proj = nn.Linear(in_channels, hidden_size)
        self.res_blocks = nn.ModuleList(_Block(hidden_size) for _ in range(num_blocks))
        self.final_layer = _FinalLayer(hidden_size, out_channels)

    def initialize(self, module: nn.Module) -> None:
        """Xavier weights, N(0, 0.02²) for time, zero for modulations and (published) the output."""
        if not isinstance(module, nn.Linear) or all(module is not own for own in self.modules()):
            return
        init.zeros_(module.bias)
        modulations = [block.adaLN_modulation[1] for block in (*self.res_blocks, self.final_layer)]
        if module is self.final_layer.linear and self.output_init == "scaled":
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif module is self.final_layer.linear or any(module is linear for linear in modulations):
            init.zeros_(module.weight)
        elif any(module is linear for linear in self.time_embed.mlp):
            init.normal_(module.weight, std=0.02)
        else:
            init.xavier_uniform_(module.weight)

    def forward(self, latent: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """A prediction for each noisy latent; leading axes broadcast.

        Args:
            latent: ``[..., in_channels]``.
            time: ``[...]``.
            condition: `cond_embed` of the hidden states, ``[..., d]``, once for all steps.

        Returns: ``[..., out_channels]``.
        """
        condition = nn.functional.silu(self.time_embed(time) + condition)
        state = self.input_proj(latent)
        recompute = is_recomputed(self, self.recompute) and torch.is_grad_enabled()
        for block in self.res_blocks:
            if recompute:
                state = checkpoint(
                    block, state, condition, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state = block(state, condition)
        return self.final_layer(state, condition)


class _TimeEmbedding(nn.Module):
    """[cos, sin] of t * 10000^(-i/128), then Linear-SiLU-Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, time: Tensor) -> Tensor:
        """``[...]`` to ``[..., H]``."""
        half = TIME_CHANNELS // 2
        exponent = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angle = time[..., None].float() * torch.exp(-math.log(MAX_PERIOD) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment] # a Linear, by __init__
        return self.mlp(features.to(first.weight.dtype))


def _modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """The published layout; its SiLU is applied once, by the `Denoiser`, for all blocks."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


class _Block(nn.Module):
    """x + gate ⊙ MLP(LN(x) ⊙ (1 + scale) + shift)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.adaLN_modulation = _modulation(hidden_size, 3)

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        """State ``[..., d]`` and condition SiLU(y) ``[..., d]`` to the next state."""
        shift, scale, gate = self.adaLN_modulation[1](condition).chunk(3, dim=-1)
        return state + gate * self.mlp(self.in_ln(state) * (1 + scale) + shift)


class _FinalLayer(nn.Module):
    """nn.Linear(LN(x) ⊙ (1 + scale) + shift), LN without weights."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        """State and condition ``[..., d]`` to ``[..., out_channels]``."""
        shift, scale = self.adaLN_modulation[1](condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(state) * (1 + scale) + shift)
