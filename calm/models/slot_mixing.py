"""A block that mixes the K slots of a chunk, so that its latent need not be a sum over tokens."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from calm.configuration import AutoencoderConfig
from calm.norm import RMSNorm

__all__ = ["INNER_FACTOR", "SlotMixing", "mixing_blocks"]

INNER_FACTOR = 4  # inner width over K


class SlotMixing(nn.Module):
    """x + SwiGLU(RMSNorm(x)) over the K slots of each channel, ``[..., K, H]``.

        t = RMSNorm(x)ᵀ, [..., H, K];    x + (D (silu(G t) ⊙ U t))ᵀ,    G, U: 4K x K, D: K x 4K

    All channels share G, U and D: 12 K² weights, and H for the norm. Its products are of different
    tokens, which the published encoder, linear from its slots to the chunk, has only after they are
    summed. Attention would have 4 H² weights and take weighted means of slots, again sums; in the
    published autoencoder it helped the reconstruction and cost the language model about 0.5
    BrierLM. D starts at zero: the block first passes its input on.

    Cost: 24 K² H operations a chunk.

    Source: the token mixing of MLP-Mixer (arXiv 2105.01601) with the gate of the other blocks.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        slots, inner = config.patch_size, INNER_FACTOR * config.patch_size
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate = nn.Linear(slots, inner, bias=False)
        self.up = nn.Linear(slots, inner, bias=False)
        self.down = nn.Linear(inner, slots, bias=False)

    def initialize(self, module: nn.Module) -> None:
        """Give `module`, if it is of this block, N(0, 1 / K) weights, whatever the initializer."""
        if module is self.gate or module is self.up:
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif module is self.down:
            init.zeros_(module.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., K, H]`` to ``[..., K, H]``."""
        by_channel = self.norm(hidden).transpose(-1, -2)
        mixed = self.down(F.silu(self.gate(by_channel)) * self.up(by_channel))
        return hidden + mixed.transpose(-1, -2)


def mixing_blocks(config: AutoencoderConfig) -> nn.ModuleList:
    """``num_mixing_layers`` of them."""
    return nn.ModuleList(SlotMixing(config) for _ in range(config.num_mixing_layers))
