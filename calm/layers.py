"""Layers of the models, with transformers' parameters and operations that suit the device."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.configuration import AutoencoderConfig
from calm_kernels.products import linear

__all__ = ["FeedForward", "Linear", "RMSNorm"]


class Linear(nn.Linear):
    """`torch.nn.Linear` by `calm_kernels.products.linear`.

    Tools that look for the exact class `torch.nn.Linear` (torch's `quantize_dynamic`) want this one
    named as well.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        return linear(inputs, self.weight, self.bias)


class FeedForward(nn.Module):
    """W_down (act(W_gate x) ⊙ W_up x): `LlamaMLP` of `Linear` layers."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width, inner, has_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=has_bias)
        self.up_proj = Linear(width, inner, bias=has_bias)
        self.down_proj = Linear(inner, width, bias=has_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(LlamaRMSNorm):
    """x / √(mean x² + ε) ⊙ w: `LlamaRMSNorm` in one operation, rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``; mixed dtypes (autocast) as in `LlamaRMSNorm`."""
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
