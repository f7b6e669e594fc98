"""The Llama backbone and the MLP that makes its inputs."""

from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.models.initialization import initialize
from calm.models.norm import RMSNorm

__all__ = ["Backbone", "compressor"]

NORM_EPS = 1e-6


class Backbone(LlamaModel):
    """`LlamaModel` with the initial weights that the configuration chooses, and with `RMSNorm`.

    transformers has no setting for the class of a layer's norms, so it is changed after they are
    built.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) is LlamaRMSNorm:
                module.__class__ = RMSNorm

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)


def compressor(in_features: int, hidden_size: int) -> nn.Sequential:
    """Two-layer MLP that turns a chunk into one input of the backbone (section 3.3.1)."""
    return nn.Sequential(
        nn.Linear(in_features, 2 * hidden_size),
        nn.SiLU(),
        nn.Linear(2 * hidden_size, hidden_size),
        nn.LayerNorm(hidden_size, eps=NORM_EPS),
    )
