"""The CALM of a shape: one place that turns sizes into configurations."""

from typing import Any, Protocol

from calm import AutoencoderConfig, CALMConfig

__all__ = ["autoencoder_config", "calm_config"]


class Sizes(Protocol):
    """Sizes of an autoencoder and a language model; names as in `benchmarks.shapes`."""

    vocab_size: int
    patch_size: int
    latent_size: int
    ae_hidden_size: int
    ae_intermediate_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_blocks: int
    noise_size: int


def autoencoder_config(sizes: Sizes, **options: Any) -> AutoencoderConfig:
    """Of the autoencoder; `options` are further fields."""
    return AutoencoderConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.ae_hidden_size,
        intermediate_size=sizes.ae_intermediate_size,
        latent_size=sizes.latent_size,
        patch_size=sizes.patch_size,
        **options,
    )


def calm_config(sizes: Sizes, **options: Any) -> CALMConfig:
    """Of the language model; `options` are further fields.

    A head whose last layer is zero would leave its gradients and its draws untested.
    """
    return CALMConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        num_mlp_layers=sizes.num_blocks,
        noise_size=sizes.noise_size,
        latent_size=sizes.latent_size,
        patch_size=sizes.patch_size,
        head_init="scaled",
        **options,
    )
