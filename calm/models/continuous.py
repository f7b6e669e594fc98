"""What the language models share: a frozen autoencoder, a backbone over chunks, loss and scores.

Shapes: B batch, P chunks of a sequence, S = P - 1 predicted ones, K tokens of a chunk, N draws of
the head, L latent size, H hidden size.
"""

import os
from copy import deepcopy
from typing import Any, ClassVar, Literal, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from calm.configuration import AutoencoderConfig, CALMConfig, locate_autoencoder
from calm.decoding.engine.predictors import ChunkPredictor, ReadoutPredictor
from calm.decoding.mixin import DecodingMixin
from calm.decoding.sampling.chunk_distribution import HeadDistribution, Method
from calm.decoding.sampling.lazy_decode import decode_compared
from calm.errors import UserError
from calm.labels import IGNORE_INDEX, Term, chunk_labels, counted_chunks, num_chunks
from calm.models.agreement import MAX_ORDER, brier_terms
from calm.models.autoencoder import Autoencoder
from calm.models.backbone import Backbone, compressor
from calm.models.cross_entropy import cross_entropy
from calm.models.heads.base import GenerativeHead, HeadLoss
from calm.models.heads.tempered import TemperedHead, spread_at
from calm.models.objective import Objective, PredictedChunks
from calm.models.output import CALMOutput, output_of
from calm.models.pretrained import CALMPreTrainedModel
from calm.models.readout import TiedReadout, TokenReadout
from calm.models.token_score import token_scores
from calm_kernels.backend import is_host_readable
from calm_kernels.noise import Seed, as_seed

__all__ = ["ContinuousTransformer"]

BRIER_DRAWS = 2  # the published estimator


class ContinuousTransformer(DecodingMixin, CALMPreTrainedModel):
    """What the three language models share; they differ in their head alone.

    A checkpoint holds the autoencoder too, which always stays frozen and in evaluation mode. A
    subclass names its `head_type` and registers its head in `_build_head`.

    Attributes:
        objective: what training and its evaluation measure instead of the head's loss and all
            other terms; None, by default, for those.
    """

    config_class = CALMConfig
    aliases: ClassVar[dict[str, str]] = Autoencoder.aliases
    head_type: ClassVar[Literal["energy", "diffusion", "flow"]]
    generative_head: GenerativeHead
    objective: Objective | None = None
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012 (an instance attribute of the parent)

    def __init__(self, config: CALMConfig) -> None:
        super().__init__(config)
        self._check_config(config)
        width = config.hidden_size
        self.patch_size = config.patch_size
        self.ae_model = Autoencoder(cast(AutoencoderConfig, config.ae_config))
        self.transformer = Backbone(config)
        if config.input_type == "latent":
            self.transformer.embed_tokens = None  # type: ignore[assignment] # never used
        else:
            self.embed_proj = compressor(config.patch_size * width, width)
        if config.input_type != "tokens":
            self.latent_proj = compressor(config.latent_size, width)
        self._build_head(config)
        self.token_readout = TokenReadout(config) if config.token_loss_weight else None
        self.post_init()
        self._freeze_autoencoder()

    def _check_config(self, config: CALMConfig) -> None:
        """Set the head type and check the configuration; an error if it has no autoencoder."""
        name = type(self).__name__
        if config.head_type not in (None, self.head_type):
            raise UserError(
                f"{name} has head_type {self.head_type!r}, but the configuration says "
                f"{config.head_type!r}: use {config.head_type.capitalize()}Transformer"
            )
        if config.ae_config is None:
            raise UserError(
                f"{name} found no autoencoder (ae_path is {config.ae_path!r}): pass ae_path=<its "
                f"folder> to from_pretrained, or use {name}.from_autoencoder(<its folder>, config)"
            )
        config.head_type = self.head_type
        config.validate_architecture()

    def _build_head(self, config: CALMConfig) -> None:
        """Register the head."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        self.generative_head.initialize(module)
        if self.token_readout is not None:
            self.token_readout.initialize(module)

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
        if isinstance(autoencoder, Autoencoder):
            trained = autoencoder
        else:
            trained = Autoencoder.from_pretrained(autoencoder, dtype=torch.float32)
        config = deepcopy(config)
        config.pair_with(trained.config)
        model = cls(config)
        model.ae_model.load_state_dict(trained.state_dict())
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; an autoencoder that the file lacks is loaded from ``ae_path``."""
        if isinstance(kwargs.get("config"), CALMConfig):
            kwargs["config"] = deepcopy(kwargs["config"])
            kwargs["config"].find_autoencoder(pretrained_model_name_or_path or "")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        lacking = {key for key in info["missing_keys"] if key.startswith("ae_model.")}
        if lacking:
            is_named = kwargs.get("ae_path") is not None
            model._load_autoencoder(pretrained_model_name_or_path or "", is_named)
            info["missing_keys"] = set(info["missing_keys"]) - lacking
        return (model, info) if output_loading_info else model

    def _load_autoencoder(self, checkpoint: str | os.PathLike[str], is_named: bool) -> None:
        found = locate_autoencoder(self.config.ae_path, checkpoint, is_named=is_named)
        if found is None:
            raise UserError(
                f"{checkpoint} lacks weights of its autoencoder, and ae_path "
                f"({self.config.ae_path!r}) leads to no folder: pass ae_path=<its folder>"
            )
        trained = Autoencoder.from_pretrained(found, dtype=self.dtype)
        self.config.pair_with(trained.config)
        self.ae_model.load_state_dict(trained.state_dict())

    # The frozen autoencoder

    def _freeze_autoencoder(self) -> None:
        self.ae_model.eval()
        self.ae_model.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except for the autoencoder; `from_pretrained` calls it after loading."""
        super().train(mode)
        self._freeze_autoencoder()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in torch, except for the autoencoder."""
        super().requires_grad_(requires_grad)
        self._freeze_autoencoder()
        return self

    # Parts

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding; None with ``input_type="latent"``."""
        return self.transformer.embed_tokens

    @property
    def start_token_id(self) -> int | None:
        """The token of the start chunk before each document; None without a start chunk."""
        return self.config.bos_token_id if self.config.has_start_patch else None

    def embed_patches(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, P*K]`` to the backbone's inputs ``[B, P, H]``."""
        num_chunks(input_ids, self.patch_size)
        embeds = []
        if self.config.input_type != "latent":
            tokens = self.transformer.embed_tokens(input_ids)
            by_chunk = rearrange(tokens, "b (p k) h -> b p (k h)", k=self.patch_size)
            embeds.append(self.embed_proj(by_chunk))
        if self.config.input_type != "tokens":
            mean, _ = self.encode(input_ids)
            embeds.append(self.latent_proj(mean.to(self.dtype)))
        return sum(embeds[1:], start=embeds[0])

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the posterior, ``[B, P, L]`` each."""
        mean, log_std = self.ae_model.encoder(input_ids=input_ids).chunk(2, dim=-1)
        return mean, log_std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents ``[..., L]`` to token ids ``[..., K]``; the logits are never formed."""
        decoder = self.ae_model.decoder
        return decoder.project(decoder.expand(latents))

    @torch.no_grad()
    def decode_compared(self, latents: Tensor, target: Tensor) -> Tensor:
        """Draws ``[N, ..., L]`` to token ids for `brier_terms` with `target` ``[..., K]``.

        On a CPU, where reading sizes costs nothing, only tokens that matter are decoded
        (`calm.decoding.sampling.lazy_decode.decode_compared`); the others are -1.
        """
        if not is_host_readable(latents):
            return self.decode_latents(latents)
        decoder = self.ae_model.decoder
        slots = decoder.expand(latents)[..., :MAX_ORDER, :]
        return decode_compared(slots, decoder.project, target[..., :MAX_ORDER])

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Hidden states ``[B, P, H]`` after each chunk of ``[B, P*K]`` token ids."""
        inputs = self.embed_patches(input_ids)
        return self.transformer(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def distribution(self, hidden: Tensor, temperature: float = 1.0) -> HeadDistribution:
        """The distribution of the chunk that follows each hidden state ``[B, H]``.

        Below T = 1 it is that of `head_at`, its noise spread as ``tempered_spread`` says.
        """
        decoder = self.ae_model.decoder
        if temperature == 1:
            return HeadDistribution(self.generative_head, decoder, hidden)
        head = self.head_at(temperature)
        spread = spread_at(temperature, self.config.tempered_spread)
        return HeadDistribution(head, decoder, head.condition(hidden, temperature), spread)

    def head_at(self, temperature: float) -> TemperedHead:
        """The head that draws at this T below 1; `UserError` where there is none."""
        raise UserError(
            f"temperature {temperature} of method 'amortized' needs a head that has learned it, "
            f"which a {type(self).__name__} cannot have: the head must be an energy head"
        )

    def make_predictor(self, method: Method, temperature: float) -> ChunkPredictor:
        """See `DecodingMixin`; the method knows its temperature."""
        if method.head_temperature != 1:
            self.head_at(method.head_temperature)  # an error before prompts are read
        return ChunkPredictor(self, method)

    def make_token_predictor(self, temperature: float) -> ReadoutPredictor:
        """See `DecodingMixin`; `UserError` without a readout."""
        self.slot_readout()
        return ReadoutPredictor(self, temperature)

    def slot_readout(self) -> TiedReadout:
        """The readout of tokens with the embedding that it shares; `UserError` without one."""
        if self.token_readout is None:
            raise UserError(
                "the model has no readout of tokens: train it with token_loss_weight=1, "
                "token_readout=causal and keep_token_readout=true (--config_overrides)"
            )
        return TiedReadout(self.token_readout, cast(nn.Embedding, self.get_input_embeddings()))

    # Training and evaluation

    def loss_counts(self, labels: Tensor) -> Tensor:
        """How many predicted chunks, and with a readout tokens, the loss is a mean over.

        Returns: int64 ``[1]``, or ``[2]`` with a readout.
        """
        targets = labels[:, self.patch_size :]
        chunks = counted_chunks(targets, self.patch_size).sum()[None]
        if self.token_readout is None:
            return chunks
        tokens = chunk_labels(targets, self.patch_size) != IGNORE_INDEX
        return torch.cat([chunks, tokens.sum()[None]])

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        loss_counts: Tensor | None,
        seed: Seed,
        first_row: int | Tensor,
        sample_noise: Tensor | None,
        draws: dict[str, Tensor | None],
        progress: float = 1.0,
    ) -> CALMOutput:
        """`forward` of the subclasses; `draws` are the arguments of their heads' losses."""
        if labels is None:
            return CALMOutput(last_hidden_state=self.hidden_states(input_ids))
        chunks = PredictedChunks(self, input_ids, self._targets(input_ids, labels))
        address: dict[str, Any] = {
            "seed": as_seed(seed, input_ids.device),
            "first_row": first_row * chunks.weight.shape[1],
        }
        if self.objective is None:
            result = self.generative_head.loss(chunks.hidden, chunks.posterior, **address, **draws)
        else:
            result = self.objective.loss(chunks, **address)
        terms = self._terms(result, chunks, progress)
        config = cast(CALMConfig, self.config)
        output = output_of(terms, config, loss_counts, is_training=self.training)
        if not self.training and self.patch_size >= MAX_ORDER and loss_counts is None:
            samples = result.samples
            if samples is None:
                samples = self.generative_head.sample(
                    chunks.hidden, sample_noise, BRIER_DRAWS, **address
                )
            self._add_brier(output, samples[:BRIER_DRAWS], chunks.targets)
        return output

    def _terms(self, result: HeadLoss, chunks: PredictedChunks, progress: float) -> dict[str, Term]:
        """Loss and parts of the head, and the terms that the configuration adds in training."""
        config, counts = self.config, chunks.weight.sum(1)
        values = {name: getattr(result, name) for name in ("loss", "fidelity", "diversity")}
        values |= result.measured
        terms = {n: Term(value.sum(1), counts) for n, value in values.items() if value is not None}
        if self.objective is not None:
            return terms
        if self.token_readout is not None:
            readout = self.slot_readout()
            by_chunk = chunks.tokens.unflatten(1, (-1, self.patch_size))
            terms["token_loss"] = cross_entropy(
                readout.features(chunks.hidden, by_chunk), readout.embedding.weight,
                chunks.labels, by_sequence=not self.training,
            )  # fmt: skip
        is_on = config.token_score_weight > 0 and progress >= config.token_score_start
        if self.training and is_on:
            draws = cast(Tensor, result.samples)[: config.token_score_samples]
            scores = token_scores(self.ae_model.decoder, draws, chunks.labels)
            terms["token_score"] = Term(scores.sum(1), counts)
        return terms

    def _targets(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Labels of the predicted chunks, ``[B, S*K]``."""
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        if num_chunks(input_ids, self.patch_size) < 2:
            raise ValueError(
                f"input_ids must hold at least two chunks of {self.patch_size} tokens, the second "
                f"to be predicted; got {tuple(input_ids.shape)}"
            )
        return labels[:, self.patch_size :]

    @torch.no_grad()
    def _add_brier(self, output: CALMOutput, samples: Tensor, targets: Tensor) -> None:
        """Brier-1 to Brier-4 of each sequence, averaged over chunks whose first tokens count."""
        by_chunk = rearrange(targets, "b (s k) -> b s k", k=self.patch_size)
        weight = (by_chunk[..., :MAX_ORDER] != IGNORE_INDEX).all(-1).to(torch.float32)
        terms = brier_terms(self.decode_compared(samples, by_chunk), by_chunk) * weight[..., None]
        by_sequence = terms.sum(1) / weight.sum(1, keepdim=True).clamp(min=1)  # [B, 4]
        for order, values in enumerate(by_sequence.unbind(-1), start=1):
            output[f"brier{order}"] = values
