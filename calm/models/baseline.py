"""The token-by-token baseline: a Llama language model whose loss never forms the logits."""

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from calm.configuration_checks import check_backbone
from calm.decoding.engine.predictors import TokenPredictor
from calm.decoding.mixin import DecodingMixin
from calm.decoding.sampling.chunk_distribution import Method
from calm.errors import UserError
from calm.integrity import check_files
from calm.labels import IGNORE_INDEX, Term
from calm.models.backbone import Backbone
from calm.models.cross_entropy import cross_entropy
from calm.models.initialization import initialize
from calm.models.loading import check_kind
from calm.pretrained import packaged

__all__ = ["BaselineOutput", "BaselineTransformer"]


@dataclass
class BaselineOutput(CausalLMOutputWithPast):
    """As in transformers.

    Attributes:
        terms: with `loss_counts`: ``loss`` as sums and counts.
    """

    terms: dict[str, Term] | None = None


class BaselineTransformer(DecodingMixin, LlamaForCausalLM):  # type: ignore[misc] # own `generate`
    """`LlamaForCausalLM` (its configuration and weights) with a chunked cross-entropy.

    `generate` is that of the other models, so that they can be compared.

    A `LlamaConfig` may carry ``initializer`` and ``embedding_std``, as the other models'
    configurations do.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: LlamaConfig) -> None:
        check_backbone(config)
        LlamaPreTrainedModel.__init__(self, config)
        self.model = Backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; names of models that come with the package are known, too.

        Raises:
            UserError: files are not those that were saved; a model of another kind.
        """
        if pretrained_model_name_or_path is not None:
            pretrained_model_name_or_path = packaged(pretrained_model_name_or_path)
        check_files(pretrained_model_name_or_path)
        check_kind(pretrained_model_name_or_path, ("baseline",), cls)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)

    def make_predictor(self, method: Method, temperature: float) -> TokenPredictor:
        """See `DecodingMixin`; every method samples from softmax(logits / T)."""
        if method.noise_scale != 1:
            raise UserError(
                f"noise_scale must be 1 for a {type(self).__name__}, which has no head whose noise "
                f"could be scaled; got {method.noise_scale}"
            )
        return self.make_token_predictor(temperature)

    def make_token_predictor(self, temperature: float) -> TokenPredictor:
        """See `DecodingMixin`."""
        return TokenPredictor(self, temperature)

    def loss_counts(self, labels: Tensor) -> Tensor:
        """How many predicted tokens the loss is a mean over, int64 ``[1]``."""
        return (labels[:, 1:] != IGNORE_INDEX).sum()[None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        loss_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Mean cross-entropy of the next token; without labels as `LlamaForCausalLM.forward`.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: as in transformers, like all that follow.
            position_ids: likewise.
            past_key_values: likewise.
            inputs_embeds: likewise.
            labels: ``[B, T]``, -100 where they do not count; they are shifted here.
            use_cache: likewise; only without labels.
            logits_to_keep: likewise; only without labels.
            loss_counts: `loss_counts` of all the batches that this one belongs to, ``[1]``. Their
                losses then add up to that of the whole, and the output has its ``terms``. If None,
                those of this batch.
            **kwargs: likewise; only without labels.
        """
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        if labels is None:
            return super().forward(
                **inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
            )
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        by_sequence = loss_counts is not None and not self.training
        term = cross_entropy(
            hidden[:, :-1], self.lm_head.weight, labels[:, 1:], by_sequence=by_sequence
        )
        if loss_counts is None:
            return CausalLMOutputWithPast(loss=term.mean())
        return BaselineOutput(loss=term.mean(loss_counts[0]), terms={"loss": term.detach()})
