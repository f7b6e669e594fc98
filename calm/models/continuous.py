"""What the language models share: a frozen autoencoder, a backbone over chunks, losses and scores of a head.

Shapes: B batch, P chunks of a sequence, S predicted ones (P - 1, or P with a start patch), K tokens
    of a chunk,
N draws of the head, L latent size, H hidden size.
"""

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from calm.configuration import CALMConfig, locate_autoencoder
from calm.errors import UserError
from calm.models.agreement import MAX_ORDER, brier_terms
from calm.models.autoencoder import Autoencoder
from calm.models.backbone import Backbone, compressor
from calm.models.chunks import IGNORED, num_chunks
from calm.models.heads.base import GenerativeHead, Posterior
from calm.models.pretrained import CALMPreTrainedModel
from calm_kernels.noise import Seed, as_seed

__all__ = ["CALMOutput", "ContinuousTransformer"]

BRIER_DRAWS = 2  # the published estimator


@dataclass
class CALMOutput(ModelOutput):
    """What a language model's `forward` returns; None where it does not apply.

    Attributes:
        loss: mean over the predicted patches that count.
        fidelity: energy head: 2 mean E|x - y|^α, so that loss = fidelity - diversity.
        diversity: energy head: mean |x - x'|^α.
        brier1: Brier-1 of each sequence, ``[B]``, from two draws a patch; in evaluation, for K >=
            4.
        brier2, brier3, brier4: likewise.
        last_hidden_state: ``[B, P, H]``, one more with a start patch; without labels.
    """

    loss: Tensor | None = None
    fidelity: Tensor | None = None
    diversity: Tensor | None = None
    brier1: Tensor | None = None
    brier2: Tensor | None = None
    brier3: Tensor | None = None
    brier4: Tensor | None = None
    last_hidden_state: Tensor | None = None


class ContinuousTransformer(CALMPreTrainedModel):
    """What the three language models share; they differ in their head alone.

    A checkpoint holds the autoencoder too. It is frozen and in evaluation mode whatever is called.
    """

    config_class = CALMConfig
    base_model_prefix = ""
    aliases: ClassVar[dict[str, str]] = Autoencoder.aliases
    head_type: ClassVar[Literal["energy", "diffusion", "flow"]]
    _no_split_modules: ClassVar[list[str]] = ["LlamaDecoderLayer"]
    supports_gradient_checkpointing = True

    generative_head: GenerativeHead

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config)
        self._check(config)
        width = config.hidden_size
        self.patch_size = config.patch_size
        self.ae_model = Autoencoder._from_config(config.ae_config)
        self.transformer = Backbone(config)
        if config.input_type == "latent":
            self.transformer.embed_tokens = None
        else:
            self.embed_proj = compressor(config.patch_size * width, width)
        if config.input_type != "tokens":
            self.latent_proj = compressor(config.latent_size, width)
        if config.has_start_patch:
            self.start_patch = nn.Parameter(torch.empty(width))
        self._build_head(config)
        self.post_init()
        self._freeze_autoencoder()

    def _check(self, config: CALMConfig) -> None:
        if config.head_type not in (None, self.head_type):
            raise UserError(
                f"{type(self).__name__} has the head type {self.head_type!r}, but the configuration says "
                f"{config.head_type!r}: load it with {config.head_type.capitalize()}Transformer"
            )
        if config.ae_config is None:
            raise UserError(
                f"no autoencoder found (ae_path={config.ae_path!r}): pass ae_path=<folder of the autoencoder> to "
                f"from_pretrained, or build the model with {type(self).__name__}.from_autoencoder(<folder>, config)"
            )
        config.head_type = self.head_type

    def _build_head(self, config: CALMConfig) -> None:
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        self.generative_head.initialize(module)
        if module is self and self.config.has_start_patch:
            init.normal_(self.start_patch, std=self.config.initializer_range)

    # Loading

    @classmethod
    def from_autoencoder(
        cls, autoencoder: str | os.PathLike[str] | Autoencoder, config: CALMConfig
    ) -> Self:
        """A new language model on a trained autoencoder, which is copied into it.

        Args:
            autoencoder: the model, or its folder or hub name.
            config: of the language model; it is not changed.

        Raises:
            UserError: the two disagree on vocab_size, patch_size or latent_size.
        """
        if not isinstance(autoencoder, Autoencoder):
            autoencoder = Autoencoder.from_pretrained(autoencoder, dtype=torch.float32)
        config = deepcopy(config)
        config.pair_with(autoencoder.config)
        model = cls(config)
        model.ae_model.load_state_dict(autoencoder.state_dict())
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; an autoencoder that the file lacks is loaded from ``ae_path``."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        lacking = {key for key in info["missing_keys"] if key.startswith("ae_model.")}
        if lacking:
            model._load_autoencoder(pretrained_model_name_or_path)
            info["missing_keys"] = set(info["missing_keys"]) - lacking
        return (model, info) if output_loading_info else model

    def _load_autoencoder(self, checkpoint: str | os.PathLike[str] | None) -> None:
        found = locate_autoencoder(self.config.ae_path, checkpoint or "")
        if found is None:
            raise UserError(
                f"{checkpoint} lacks weights of its autoencoder and none was found at ae_path="
                f"{self.config.ae_path!r}: pass ae_path=<folder of the autoencoder>"
            )
        trained = Autoencoder.from_pretrained(found, dtype=self.dtype)
        self.config.pair_with(trained.config)
        self.ae_model.load_state_dict(trained.state_dict())

    # The frozen autoencoder

    def _freeze_autoencoder(self) -> None:
        self.ae_model.eval()
        self.ae_model.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except for the autoencoder; `from_pretrained` ends here, with new parameters."""
        super().train(mode)
        self._freeze_autoencoder()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in torch, except for the autoencoder."""
        super().requires_grad_(requires_grad)
        self._freeze_autoencoder()
        return self

    # Parts

    def get_input_embeddings(self) -> nn.Module | None:
        """The backbone's token embedding; None with ``input_type="latent"``."""
        return self.transformer.embed_tokens

    def embed_patches(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, P*K]`` to the backbone's inputs ``[B, P, H]`` (without the start patch)."""
        num_chunks(input_ids, self.patch_size)
        embeds: Tensor | None = None
        if self.config.input_type != "latent":
            tokens = self.transformer.embed_tokens(input_ids)
            embeds = self.embed_proj(rearrange(tokens, "b (p k) h -> b p (k h)", k=self.patch_size))
        if self.config.input_type != "tokens":
            mean, _ = self._encode(input_ids)
            latents = self.latent_proj(mean.to(self.latent_proj[0].weight.dtype))
            embeds = latents if embeds is None else embeds + latents
        return embeds

    def start_embeds(self, batch_size: int) -> Tensor:
        """The learned first input, ``[B, 1, H]``, or none, ``[B, 0, H]``."""
        if not self.config.has_start_patch:
            return self.transformer.norm.weight.new_empty(batch_size, 0, self.config.hidden_size)
        return self.start_patch.expand(batch_size, 1, -1)

    @torch.no_grad()
    def _encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the posterior, ``[B, P, L]`` each."""
        mean, log_std = self.ae_model.encoder(input_ids=input_ids).chunk(2, dim=-1)
        return mean, log_std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[..., L]`` to token ids ``[..., K]``; the logits are never formed."""
        return self.ae_model.decoder.argmax(latents)

    # Training and evaluation

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        seed: Seed,
        first_row: int | Tensor,
        sample_noise: Tensor | None,
        draws: dict[str, Tensor | None],
    ) -> CALMOutput:
        if labels is None:
            return CALMOutput(last_hidden_state=self._hidden_states(input_ids))
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
            )
        num_predicted = num_chunks(input_ids, self.patch_size) - (not self.config.has_start_patch)
        if num_predicted < 1:
            raise ValueError(
                f"input_ids must hold a chunk to predict after the first, got {tuple(input_ids.shape)}"
            )
        hidden = self._hidden_states(input_ids[:, : -self.patch_size])  # [B, S, H]
        targets = labels[:, -num_predicted * self.patch_size :]
        posterior = self._posterior(targets)
        seed, first_patch = as_seed(seed, hidden.device), first_row * hidden.shape[1]
        result = self.generative_head.loss(
            hidden, posterior, seed=seed, first_row=first_patch, **draws
        )
        output = CALMOutput(
            loss=result.loss, fidelity=_detach(result.fidelity), diversity=_detach(result.diversity)
        )
        if not self.training and self.patch_size >= MAX_ORDER:
            samples = result.samples
            if samples is None:
                samples = self.generative_head.sample(
                    hidden, sample_noise, BRIER_DRAWS, seed, first_patch
                )
            self._add_brier(output, samples[:BRIER_DRAWS], targets, posterior.weight)
        return output

    def _hidden_states(self, input_ids: Tensor) -> Tensor:
        """Hidden states after the start patch, if there is one, and each chunk."""
        inputs = torch.cat(
            [self.start_embeds(len(input_ids)), self.embed_patches(input_ids)], dim=1
        )
        return self.transformer(inputs_embeds=inputs).last_hidden_state

    def _posterior(self, targets: Tensor) -> Posterior:
        """The law of the latents of ``[B, S*K]`` labels; a patch counts unless its first label is -100."""
        pad = self.config.pad_token_id or 0
        mean, log_std = self._encode(targets.masked_fill(targets == IGNORED, pad))
        weight = (targets[:, :: self.patch_size] != IGNORED).to(torch.float32)
        return Posterior(mean, log_std, weight)

    @torch.no_grad()
    def _add_brier(
        self, output: CALMOutput, samples: Tensor, targets: Tensor, weight: Tensor
    ) -> None:
        """Brier-1 to Brier-4 of each sequence, averaged over the patches that count."""
        true = rearrange(targets, "b (s k) -> b s k", k=self.patch_size)
        terms = brier_terms(self.decode_latents(samples), true) * weight[..., None]
        by_sequence = terms.sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
        for order, values in enumerate(by_sequence.unbind(-1), start=1):
            output[f"brier{order}"] = values


def _detach(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
