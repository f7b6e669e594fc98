"""The autoencoder: K tokens to the mean and log standard deviation of one latent, and back.

Shapes: B batch, P chunks of a sequence, K tokens of a chunk, L latent size, H hidden size, V
vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import ModelOutput

from calm.configuration import AutoencoderConfig
from calm.decoding.engine.fused_layers import are_fused, fused_mlp, is_plain_mlp
from calm.errors import UserError
from calm.labels import IGNORE_INDEX, Term, num_chunks
from calm.models.alignment import Alignment, middle_of
from calm.models.baseline import BaselineTransformer
from calm.models.cross_entropy import cross_entropy
from calm.models.latent_options import mean_on_sphere, noise_size, on_sphere, with_noise
from calm.models.pretrained import CALMPreTrainedModel
from calm.models.slot_mixing import SlotMixing, mixing_blocks
from calm.norm import RMSNorm
from calm_kernels.linear_argmax import linear_argmax
from calm_kernels.noise import Seed, Stream, as_seed
from calm_kernels.reparameterize import reparameterize
from calm_kernels.uniform_draws import uniform_draws

__all__ = ["Autoencoder", "AutoencoderOutput"]


@dataclass
class AutoencoderOutput(ModelOutput):
    """What `Autoencoder.forward` returns: scalars unless a shape is given, or None.

    Attributes:
        loss: K * reconstruction_loss + kl_weight * kl in training, and with a teacher
            alignment_weight * alignment; reconstruction_loss in evaluation. With `loss_counts`,
            this batch's share of it.
        reconstruction_loss: mean cross-entropy of a token.
        kl: mean over chunks of the KL divergence, summed over dimensions after the floor.
        collapsed: share of latent dimensions whose mean KL divergence does not exceed the floor.
        alignment: mean over chunks of 1 - cos, see `calm.models.alignment`; in training.
        accuracy: share of tokens reconstructed from a drawn latent, ``[B]``; in evaluation.
        logits: ``[B, P*K, V]``; without labels.
        terms: with `loss_counts`: ``reconstruction_loss``, ``kl`` and ``dimension_kl`` (the KL
            divergence of each latent dimension, before the floor), ``accuracy`` in evaluation and
            ``alignment`` in training, as sums and counts.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    kl: Tensor | None = None
    collapsed: Tensor | None = None
    alignment: Tensor | None = None
    accuracy: Tensor | None = None
    logits: Tensor | None = None
    terms: dict[str, Term] | None = None


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)), ``[..., H]``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.mlp = LlamaMLP(config)
        self.layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``; in two launches where kernels run and rows are few."""
        if are_fused(hidden) and is_plain_mlp(self.layernorm, self.mlp):
            return fused_mlp(self.layernorm, self.mlp, hidden)
        return hidden + self.mlp(self.layernorm(hidden))


def _blocks(config: AutoencoderConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(config) for _ in range(count))


class Encoder(nn.Module):
    """Half of the blocks on single tokens, the other half on the whole chunk."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_size = config.patch_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.encoder_layers = _blocks(config, config.num_encoder_layers)
        self.mixing_layers = mixing_blocks(config)
        self.squeeze_layer = nn.Linear(config.patch_size * width, width)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.hidden_to_latent = nn.Linear(width, 2 * config.latent_size)
        self.is_on_sphere = config.latent_sphere

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, P*K]`` to mean and log std side by side, ``[B, P, 2L]``."""
        middle = len(self.encoder_layers) // 2
        hidden = self.embed_tokens(input_ids)
        for block in self.encoder_layers[:middle]:
            hidden = block(hidden)
        hidden = hidden.unflatten(1, (-1, self.patch_size))
        for mixing in self.mixing_layers:
            hidden = mixing(hidden)
        hidden = self.squeeze_layer(rearrange(hidden, "b p k h -> b p (k h)"))
        for block in self.encoder_layers[middle:]:
            hidden = block(hidden)
        states = self.hidden_to_latent(self.norm(hidden))
        return mean_on_sphere(states) if self.is_on_sphere else states


class Decoder(nn.Module):
    """The encoder mirrored; logits come from the encoder's embedding matrix."""

    def __init__(self, config: AutoencoderConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_size = config.patch_size
        self.is_on_sphere = config.latent_sphere
        self.latent_to_hidden = nn.Linear(config.latent_size, width)
        self.decoder_layers = _blocks(config, config.num_decoder_layers)
        self.expand_layer = nn.Linear(width, config.patch_size * width)
        self.mixing_layers = mixing_blocks(config)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        # In a tuple, so that the matrix is registered and saved once, by the encoder.
        self._tied = (embed_tokens,)

    @property
    def output_weight(self) -> Tensor:
        """The embedding matrix, ``[V, H]``."""
        return self._tied[0].weight

    def expand(self, latent_states: Tensor) -> Tensor:
        """Latents ``[..., L]`` to slots, one hidden state for each token, ``[..., K, H]``.

        This half of the blocks runs once for a chunk, `finish` once for each slot. Some heads
        always draw latents in float32; here they get the dtype of the weights.
        """
        latents = on_sphere(latent_states) if self.is_on_sphere else latent_states
        hidden = self.latent_to_hidden(latents.to(self.output_weight.dtype))
        for block in self.decoder_layers[: len(self.decoder_layers) // 2]:
            hidden = block(hidden)
        slots = self.expand_layer(hidden).unflatten(-1, (self.patch_size, -1))
        for mixing in self.mixing_layers:
            slots = mixing(slots)
        return slots

    def finish(self, hidden: Tensor) -> Tensor:
        """Slots of `expand`, each on its own, to the last hidden states, ``[..., H]``."""
        for block in self.decoder_layers[len(self.decoder_layers) // 2 :]:
            hidden = block(hidden)
        return self.norm(hidden)

    def decode(self, latent_states: Tensor) -> Tensor:
        """Latents ``[..., L]`` to the last hidden states, before the logits, ``[..., K, H]``."""
        return self.finish(self.expand(latent_states))

    def forward(self, latent_states: Tensor) -> Tensor:
        """Latents ``[B, P, L]`` to logits ``[B, P*K, V]``."""
        hidden = rearrange(self.decode(latent_states), "b p k h -> b (p k) h")
        return F.linear(hidden, self.output_weight)

    def project(self, hidden: Tensor) -> Tensor:
        """Slots of `expand`, ``[..., H]``, to token ids ``[...]``; the logits are never formed."""
        return self.tokens(self.finish(hidden))

    def tokens(self, decoded: Tensor) -> Tensor:
        """Hidden states of `decode`, ``[..., H]``, to the likeliest token ids ``[...]``."""
        return cast(Tensor, linear_argmax(decoded, self.output_weight))


class Autoencoder(CALMPreTrainedModel):
    """Variational autoencoder over chunks of K tokens.

    Weights keep the published names. A published file holds the embedding matrix as
    ``encoder.embed_tokens.weight``, as ``decoder.lm_head_weight`` or as both.

    Source: CALM, section 2.
    """

    config_class = AutoencoderConfig
    base_model_prefix = ""
    kinds = ("autoencoder",)
    aliases: ClassVar[dict[str, str]] = {
        r"decoder\.lm_head_weight$": "encoder.embed_tokens.weight",
    }
    # Of checkpoints, which hold what training alone needs.
    _keys_to_ignore_on_load_unexpected = [r"^alignment\."]  # noqa: RUF012 (as in transformers)

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.patch_size = config.patch_size
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, self.encoder.embed_tokens)
        self.alignment: Alignment | None = None
        self.post_init()

    def attach_teacher(self, baseline: BaselineTransformer) -> None:
        """Train with ``alignment_weight`` from now on; `baseline` is taken apart (`middle_of`)."""
        self.alignment = Alignment(cast(AutoencoderConfig, self.config), middle_of(baseline))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for block in (*self.encoder.mixing_layers, *self.decoder.mixing_layers):
            cast(SlotMixing, block).initialize(module)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of both encoder and decoder."""
        return self.encoder.embed_tokens

    def loss_counts(self, labels: Tensor) -> Tensor:
        """How many tokens and how many chunks the loss is a mean over, int64 ``[2]``.

        A chunk counts unless its first label is -100.
        """
        is_counted = labels != IGNORE_INDEX
        return torch.stack([is_counted.sum(), is_counted[:, :: self.patch_size].sum()])

    def collapsed(self, dimension_kl: Tensor) -> Tensor:
        """Share of dimensions whose mean KL divergence ``[L]`` does not exceed the floor."""
        return (dimension_kl <= self.config.kl_clamp).to(dimension_kl.dtype).mean()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        loss_counts: Tensor | None = None,
        token_keep: Tensor | None = None,
        latent_noise: Tensor | None = None,
        latent_keep: Tensor | None = None,
        decoder_noise: Tensor | None = None,
        seed: Seed = None,
        first_row: int | Tensor = 0,
        progress: float = 1.0,
    ) -> AutoencoderOutput:
        """Encode, draw a latent, decode.

        loss = K * cross-entropy + kl_weight * mean_chunk Σ_i max(kl_clamp, KL_i); in evaluation the
        cross-entropy alone

        Training drops tokens of the input (they become id 0) and elements of the latent, and adds
        the noise of ``decoder_noise`` in the configuration; evaluation draws the latent alone.

        Args:
            input_ids: ``[B, P*K]`` int64.
            labels: the tokens to reconstruct, ``[B, P*K]``, -100 where they do not count; None for
                logits alone.
            loss_counts: `loss_counts` of all the batches that this one belongs to, ``[2]``. Their
                losses then add up to that of the whole, and the output has its ``terms``. If None,
                those of this batch.
            token_keep: tokens to keep, bool, one row per chunk, ``[B*P, K]``. Drawn in training if
                None.
            latent_noise: ``[B*P, L]``, N(0, 1). Drawn if None.
            latent_keep: elements of the latent to keep, bool, ``[B*P, L]``. Drawn in training if
                None.
            decoder_noise: N(0, 1) that training adds where the configuration says so, ``[B*P, L]``.
                Drawn if None.
            seed: of draws that are not given, see `calm_kernels.noise.as_seed`.
            first_row: index of the first sequence within the global batch; a batch split over
                processes or accumulation steps then draws what the whole batch would.
            progress: share of the training that is done, which decides how large that noise is.
        """
        chunks = num_chunks(input_ids, self.patch_size)
        seed, first_chunk = as_seed(seed, input_ids.device), first_row * chunks
        read_ids = input_ids
        token_dropout, latent_dropout = self._dropouts() if self.training else (0.0, 0.0)
        if token_keep is not None or token_dropout > 0.0:
            input_ids = self._drop_tokens(input_ids, token_keep, token_dropout, seed, first_chunk)
        latent_states = self.encoder(input_ids=input_ids)
        latent, kl = reparameterize(
            latent_states,
            kl_floor=float(self.config.kl_clamp),
            dropout=latent_dropout,
            latent_noise=latent_noise,
            latent_keep=latent_keep,
            seed=seed,
            first_row=first_chunk,
        )
        size = noise_size(cast(AutoencoderConfig, self.config), progress) if self.training else 0.0
        if size > 0.0:
            latent = with_noise(latent, size, decoder_noise, seed, first_chunk)
        if labels is None:
            return AutoencoderOutput(logits=self.decoder(latent_states=latent))
        is_counted = labels[:, :: self.patch_size] != IGNORE_INDEX
        alignment = self._alignment(latent_states, read_ids, is_counted)
        return self._losses(latent_states, latent, kl, labels, loss_counts, alignment)

    def _alignment(
        self, latent_states: Tensor, input_ids: Tensor, is_counted: Tensor
    ) -> dict[str, Term]:
        """The term of ``alignment_weight``, in training."""
        if not self.training or not self.config.alignment_weight:
            return {}
        if self.alignment is None:
            raise UserError(
                f"alignment_weight={self.config.alignment_weight} needs a teacher: pass "
                "--teacher_name_or_path, the folder of a trained token baseline, or call "
                "attach_teacher"
            )
        gaps = self.alignment(latent_states.chunk(2, dim=-1)[0], input_ids)
        return {"alignment": Term((gaps * is_counted).sum(1), is_counted.sum(1))}

    def _dropouts(self) -> tuple[float, float]:
        """Probabilities of dropping a token, and an element of the latent, in training."""
        config = self.config
        token, latent = (
            config.ae_dropout if chance is None else chance
            for chance in (config.token_dropout, config.latent_dropout)
        )
        return float(token), float(latent)

    def _drop_tokens(
        self,
        input_ids: Tensor,
        keep: Tensor | None,
        dropout: float,
        seed: Tensor,
        first_chunk: int | Tensor,
    ) -> Tensor:
        """A dropped token becomes id 0, as published."""
        shape = (input_ids.numel() // self.patch_size, self.patch_size)
        if keep is None:
            drawn = uniform_draws(
                *shape,
                stream=Stream.TOKEN_KEEP,
                seed=seed,
                first_row=first_chunk,
                device=input_ids.device,
            )
            keep = drawn >= dropout
        elif keep.numel() != input_ids.numel() or keep.shape[-1] != self.patch_size:
            raise ValueError(
                f"token_keep must have shape {shape}, a row per chunk, got {tuple(keep.shape)}"
            )
        return input_ids * keep.reshape(input_ids.shape)

    def _losses(
        self,
        latent_states: Tensor,
        latent: Tensor,
        kl: Tensor,
        labels: Tensor,
        loss_counts: Tensor | None,
        extra: dict[str, Term],
    ) -> AutoencoderOutput:
        decoded = self.decoder.decode(latent)  # [B, P, K, H]
        by_chunk = rearrange(labels, "b (p k) -> b p k", k=self.patch_size)
        by_sequence = loss_counts is not None and not self.training
        weight = self.decoder.output_weight
        reconstruction = cross_entropy(decoded, weight, by_chunk, by_sequence=by_sequence)
        # A chunk of padding counts for nothing.
        is_counted = by_chunk[..., 0] != IGNORE_INDEX
        chunks = is_counted.sum(1)
        kl_term = Term((kl * is_counted).sum(1), chunks)
        dimension_kl = Term(self._dimension_kl(latent_states, is_counted), chunks)
        terms = {"reconstruction_loss": reconstruction, "kl": kl_term, "dimension_kl": dimension_kl}
        terms |= extra
        of_tokens, of_chunks = (None, None) if loss_counts is None else loss_counts
        loss, accuracy = reconstruction.mean(of_tokens), None
        if self.training:
            loss = self.patch_size * loss + self.config.kl_weight * kl_term.mean(of_chunks)
            for term in extra.values():
                loss = loss + self.config.alignment_weight * term.mean(of_chunks)
        else:
            is_right = self.decoder.tokens(decoded) == by_chunk  # no token is IGNORE_INDEX
            terms["accuracy"] = Term(is_right.sum((1, 2)), reconstruction.counts)
            accuracy = terms["accuracy"].sums / reconstruction.counts.clamp(min=1)
        return AutoencoderOutput(
            loss=loss,
            reconstruction_loss=reconstruction.mean().detach(),
            kl=kl_term.mean().detach(),
            collapsed=self.collapsed(dimension_kl.mean()),
            alignment=extra["alignment"].mean().detach() if extra else None,
            accuracy=accuracy,
            terms=None if loss_counts is None else {n: term.detach() for n, term in terms.items()},
        )

    @torch.no_grad()
    def _dimension_kl(self, latent_states: Tensor, is_counted: Tensor) -> Tensor:
        """KL divergence of each dimension, summed over the chunks that count, ``[B, L]``."""
        dtype = torch.promote_types(latent_states.dtype, torch.float32)
        mean, log_std = latent_states.to(dtype).chunk(2, dim=-1)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return (kl * is_counted[..., None]).sum(1)
