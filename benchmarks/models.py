"""A language model of given sizes, and the same with the layers of the published code."""

from copy import deepcopy
from typing import Any, Protocol, TypeVar

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calm import AutoencoderConfig, CALMConfig
from calm.norm import RMSNorm

__all__ = ["as_published", "autoencoder_config", "calm_config"]

Model = TypeVar("Model", bound=nn.Module)


def as_published(model: Model) -> Model:
    """A copy with transformers' norms: what the reference runs on."""
    copied = deepcopy(model)
    for module in copied.modules():
        if type(module) is RMSNorm:
            module.__class__ = LlamaRMSNorm
    return copied


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
    """Configuration of the autoencoder; `options` are further fields."""
    return AutoencoderConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.ae_hidden_size,
        intermediate_size=sizes.ae_intermediate_size,
        latent_size=sizes.latent_size,
        patch_size=sizes.patch_size,
        **options,
    )


def calm_config(sizes: Sizes, **options: Any) -> CALMConfig:
    """Configuration of the language model; `options` are further fields.

    The head starts with scaled weights: with a last layer of zeros its gradients and its draws
    would not be tested.
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
