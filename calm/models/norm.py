"""The norm of backbone and autoencoder."""

import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

__all__ = ["RMSNorm"]


class RMSNorm(LlamaRMSNorm):
    """x / √(mean x² + ε) ⊙ w: `LlamaRMSNorm` in one operation, rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``; mixed dtypes (autocast) as in `LlamaRMSNorm`."""
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
