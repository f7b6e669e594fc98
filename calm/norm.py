"""The norm of backbone and autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm_kernels.autograd import is_autocast_on

__all__ = ["RMSNorm"]


class RMSNorm(LlamaRMSNorm):
    """x / √(mean x² + ε) ⊙ w: `LlamaRMSNorm` in one operation, rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``, computed in float32 where the dtype is narrower.

        Under autocast the result has its dtype, once for all layers that read it; they would
        otherwise each cast it. Other mixed dtypes are treated as in `LlamaRMSNorm`.
        """
        device, dtype = hidden_states.device.type, hidden_states.dtype
        shape, epsilon = self.weight.shape, self.variance_epsilon
        if is_autocast_on(device) and torch.float64 not in (dtype, self.weight.dtype):
            normed = F.rms_norm(hidden_states.float(), shape, self.weight.float(), epsilon)
            return normed.to(torch.get_autocast_dtype(device))
        if dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, shape, self.weight, epsilon)
