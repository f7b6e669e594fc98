"""The model of a stage: with random weights, from a configuration, or from saved weights."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm.data.encoding import vocabulary_size
from calm.errors import UserError
from calm.memory import check_memory
from calm.models import Autoencoder
from calm.models.loading import load_checked, load_config, on_meta
from calm.training.flags.arguments import ModelArguments
from calm.training.flags.config_overrides import build_config, parse_overrides

__all__ = [
    "check_context",
    "check_vocabulary",
    "check_weights",
    "load_pretrained",
    "new_config",
    "weight_dtype",
]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_dtype(name: str | None) -> torch.dtype | str:
    """The type that ``--torch_dtype`` names; float32 by default, not the type of the file."""
    if name == "auto":
        return "auto"
    if name is not None and name not in DTYPES:
        raise UserError(f"torch_dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name or "float32"]


def load_pretrained(
    model_class: type[Model], name: str, arguments: ModelArguments, argument: str, **options: Any
) -> Model:
    """`load_checked` with the options that the flags `arguments` give."""
    return load_checked(
        model_class,
        name,
        argument,
        dtype=weight_dtype(arguments.torch_dtype),
        revision=arguments.model_revision,
        token=arguments.token,
        cache_dir=arguments.cache_dir,
        **options,
    )


def new_config(
    config_class: type[Config],
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    extras: Mapping[str, Any] | None = None,
    **known: Any,
) -> Config:
    """Configuration of a new model: from flags, else `known` fields, else ``--config_name``.

    Args:
        config_class: of the model.
        arguments: with ``config_name`` and ``config_overrides``.
        tokenizer: its special tokens become the model's.
        extras: further fields that the constructor takes, with their types.
        known: fields that the tokenizer or another model determines.
    """
    base = None
    if arguments.config_name:
        base = load_config(
            config_class,
            arguments.config_name,
            "config_name",
            cache_dir=arguments.cache_dir,
            revision=arguments.model_revision,
            token=arguments.token,
        )
    overrides = parse_overrides(arguments.config_overrides)
    overrides.pop("model_type", None)  # names the class, see train_calm
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known.setdefault(name, getattr(tokenizer, name))
    return build_config(config_class, overrides, base, extras or {}, **known)


def check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Every token of `tokenizer` has a row in the embedding of `owner`."""
    needed = vocabulary_size(tokenizer)
    if needed > vocab_size:
        raise UserError(
            f"the tokenizer needs {needed} entries, {owner} only {vocab_size}; use the "
            "tokenizer that it was trained with (saved with its weights: leave tokenizer_name out)"
        )


def check_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """A new model of this configuration fits into the memory of this machine.

    They are made on the CPU, in float32.
    """
    count = sum(parameter.numel() for parameter in on_meta(model_class, config).parameters())
    check_memory(f"a {model_class.__name__} of {count:,} weights", 4 * count, torch.device("cpu"))


def check_context(model: PreTrainedModel, block_size: int) -> None:
    """The positions of a language model reach to the end of a block."""
    patch_size = getattr(model, "patch_size", 1)
    context, needed = model.config.max_position_embeddings, block_size // patch_size
    if not isinstance(model, Autoencoder) and needed > context:
        raise UserError(
            f"max_position_embeddings={context} is too small for blocks of {block_size} tokens, "
            f"{needed} chunks: pass config_overrides max_position_embeddings={needed}, or "
            f"block_size={context * patch_size}"
        )
