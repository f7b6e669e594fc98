"""The configuration of the autoencoder: published field names, checked values."""

from typing import ClassVar, Literal

from transformers import PreTrainedConfig

from calm.configuration_checks import checked, require, require_numbers, require_positive

__all__ = ["AutoencoderConfig", "Initializer"]

Initializer = Literal["normal", "fan_in"]


@checked
class AutoencoderConfig(PreTrainedConfig):
    """Shape and regularisation of the autoencoder: K tokens to one latent and back.

    Args:
        vocab_size: V, entries of the tokenizer.
        patch_size: K, tokens of a chunk.
        latent_size: l, width of the latent (the paper takes 32 K).
        hidden_size: width of the residual blocks.
        intermediate_size: inner width of their SwiGLU.
        num_encoder_layers: blocks of the encoder, an even number: half of them read single tokens,
            half the whole chunk.
        num_decoder_layers: likewise for the decoder.
        num_mixing_layers: blocks that mix a chunk's K slots (`calm.models.slot_mixing`), in the
            encoder before it sums them and in the decoder after it has formed them; 0 for none, as
            published.
        ae_dropout: probability of dropping a token of the input, and an element of the latent, in
            training.
        token_dropout: the first of these two; None for ae_dropout, as published.
        latent_dropout: the second; likewise.
        kl_clamp: λ_KL, floor of the KL divergence per dimension.
        kl_weight: weight of the KL term in the loss.
        latent_sphere: the mean is put on the sphere of radius √l, and so is every latent that the
            decoder reads (`calm.models.latent_options.on_sphere`). Standard deviation, draw and KL
            term stay as they are; Σ mean² / 2 = l / 2 of the KL is then constant, so that above the
            floor it teaches the standard deviation alone.
        whitening: another basis of the latent, measured on the training text when training ends
            (`calm.models.whitening`): ``none`` (published), ``diagonal``, unit variances, or
            ``full``, unit covariance, with one standard deviation for all chunks. Checkpoints still
            have the basis that was trained.
        decoder_noise: s, standard deviation of noise that training adds to the latent after its
            dropout, in the latent's unit; 0 for none, as published. Nothing but the KL term keeps
            the encoder from answering with larger means, unless they are on a sphere.
        decoder_noise_growth: share of the training over which s grows from 0, in a straight line;
            0 for all of it from the start.
        alignment_weight: λ of a training term, λ (1 - cos(P μ + b, t)) with the state t of a token
            baseline (`calm.models.alignment`), which training takes from ``teacher_name_or_path``;
            0 for none, as published. The loss of an evaluation is without it, and the trained model
            is saved as one without it.
        initializer: ``normal`` (published: N(0, initializer_range²)) or ``fan_in`` (N(0, 0.49 /
            fan_in)), which learns faster at small widths.
        initializer_range: standard deviation of ``normal`` weights.
        embedding_std: standard deviation of the embedding; None for initializer_range.

    Source: CALM, sections 2.1, 2.2 and 7.1; the defaults are the published K = 4 autoencoder. What
    the latent's options are for is in docs/latent.md.
    """

    model_type = "calm_autoencoder"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "logits", "reconstruction_loss", "kl", "collapsed", "alignment",
    ]  # fmt: skip

    vocab_size: int = 128256
    patch_size: int = 4
    latent_size: int = 128
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    num_mixing_layers: int = 0
    ae_dropout: int | float = 0.15
    token_dropout: int | float | None = None
    latent_dropout: int | float | None = None
    kl_clamp: int | float = 0.5
    kl_weight: int | float = 1e-3
    latent_sphere: bool = False
    whitening: Literal["none", "diagonal", "full"] = "none"
    decoder_noise: int | float = 0
    decoder_noise_growth: int | float = 0.5
    alignment_weight: int | float = 0
    hidden_act: str = "silu"
    rms_norm_eps: int | float = 1e-6
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    initializer: Initializer = "normal"
    initializer_range: int | float = 0.02
    embedding_std: int | float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def validate_architecture(self) -> None:
        """Checks across fields; run on construction and on saving."""
        require_numbers(self)
        require_positive(
            self, "vocab_size", "patch_size", "latent_size", "hidden_size", "intermediate_size"
        )
        for name in ("num_encoder_layers", "num_decoder_layers"):
            layers = getattr(self, name)
            require(
                layers >= 2 and layers % 2 == 0,
                f"{name} must be even and at least 2 (half read tokens, half chunks), got {layers}",
            )
        mixing = self.num_mixing_layers
        require(mixing >= 0, f"num_mixing_layers must be at least 0, got {mixing}")
        for name in ("ae_dropout", "token_dropout", "latent_dropout"):
            chance = getattr(self, name)
            is_valid = chance is None or 0 <= chance < 1
            require(is_valid, f"{name} must lie in [0, 1), got {chance}")
        for name in ("kl_clamp", "kl_weight", "decoder_noise", "alignment_weight"):
            size = getattr(self, name)
            require(size >= 0, f"{name} must be at least 0, got {size}")
        require(
            self.whitening == "none" or not self.latent_sphere,
            f"whitening must be none with latent_sphere, whose means no change of basis keeps on "
            f"the sphere; got {self.whitening!r}",
        )
        growth = self.decoder_noise_growth
        require(0 <= growth <= 1, f"decoder_noise_growth must lie in [0, 1], got {growth}")
