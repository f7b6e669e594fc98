"""The token-by-token baseline: a Llama language model whose loss never forms the logits."""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from calm.models.backbone import Backbone
from calm.models.initialization import initialize
from calm_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["BaselineTransformer"]


class BaselineTransformer(LlamaForCausalLM):
    """`LlamaForCausalLM` (its configuration, weights and `generate`) with a chunked cross-entropy.

    A `LlamaConfig` may carry ``initializer`` and ``embedding_std``, as the other models' configurations do.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: LlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = Backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **inputs: Tensor | None
    ) -> CausalLMOutputWithPast:
        """Mean cross-entropy of the next token, or logits where no labels are given.

        Args:
            input_ids: ``[B, T]`` int64.
            labels: ``[B, T]``, -100 where they do not count; they are shifted here.
            inputs: further inputs of `LlamaForCausalLM.forward` (attention_mask, past_key_values, ...).
        """
        if labels is None:
            return super().forward(input_ids=input_ids, **inputs)
        hidden = self.model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        loss = linear_cross_entropy(hidden[:, :-1], self.lm_head.weight, labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss)
