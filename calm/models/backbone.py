"""The Llama backbone and the MLP that makes its inputs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm.errors import UserError
from calm.models.initialization import initialize
from calm.norm import RMSNorm

__all__ = ["Backbone", "compile_layers", "compressor"]

NORM_EPS = 1e-6
CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


class Backbone(LlamaModel):
    """`LlamaModel` with the initial weights that the configuration chooses, and with `RMSNorm`.

    transformers has no setting for the class of a layer's norms, so it is changed after they are
    built.

    Attributes:
        compiles_layers: whether training runs each layer as one compiled graph, which all layers
            share. Evaluation, masks and decoding run the layers as they are.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.compiles_layers = False
        for module in self.modules():
            if type(module) is LlamaRMSNorm:
                module.__class__ = RMSNorm

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """As `LlamaModel.forward`, which every option and every mask reaches.

        Whole sequences without a mask, as in training, go straight through the layers with causal
        attention: `LlamaModel` would read from the device whether positions begin anew within a
        row, and under `torch.compile` would form a mask ``[B, 1, S, S]``, which flash attention
        does not take.
        """
        is_plain = use_cache is False and all(option is None for option in options.values())
        if not is_plain or not self._is_causal_without_mask():
            return super().forward(
                input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **options
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        rotation = self.rotary_emb(hidden, position_ids=positions[None])
        run = _compiled_layer() if self.compiles_layers and self.training else _run_layer
        for layer in self.layers:
            hidden = run(layer, hidden, rotation)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    def _is_causal_without_mask(self) -> bool:
        """Whether layers need no mask to be causal, and nobody asks for what they compute."""
        config = self.config
        return (
            config._attn_implementation in CAUSAL_WITHOUT_MASK and not config.output_hidden_states
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)


def _run_layer(layer: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    output: Tensor = layer(hidden, position_embeddings=rotation)
    return output


@cache
def _compiled_layer() -> Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]:
    """`_run_layer`, compiled by its first call of each dtype and number of chunks."""
    # Or a layer is cut where a bucket of DistributedDataParallel is full. Gradients of a layer are
    # exchanged while those of the layers below are computed in any case.
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(_run_layer, fullgraph=True)


def compile_layers(model: nn.Module) -> None:
    """Let training run the decoder layers of `model` compiled; names of weights stay.

    Raises:
        UserError: it has no decoder layers, or its attention needs a mask.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    if not backbones:
        raise UserError(
            f"torch_compile compiles decoder layers, but {type(model).__name__} has none: take the "
            "flag out"
        )
    for backbone in backbones:
        if not backbone._is_causal_without_mask():
            raise UserError(
                "torch_compile needs attention that is causal without a mask "
                f"({', '.join(CAUSAL_WITHOUT_MASK)}) and no output_hidden_states; got "
                f"attn_implementation={backbone.config._attn_implementation!r}, "
                f"output_hidden_states={backbone.config.output_hidden_states}"
            )
        backbone.compiles_layers = True


def compressor(in_features: int, hidden_size: int) -> nn.Sequential:
    """Two-layer MLP that turns a chunk into one input of the backbone (section 3.3.1)."""
    return nn.Sequential(
        nn.Linear(in_features, 2 * hidden_size),
        nn.SiLU(),
        nn.Linear(2 * hidden_size, hidden_size),
        nn.LayerNorm(hidden_size, eps=NORM_EPS),
    )
