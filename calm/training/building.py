"""The model of a stage: with random weights, from a configuration, or from saved weights."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm.data.encoding import vocabulary_size
from calm.errors import UserError
from calm.integrity import check_finite
from calm.training.arguments import ModelArguments
from calm.training.config_overrides import build_config, parse_overrides

__all__ = ["check_vocabulary", "load_pretrained", "new_config", "weight_dtype"]

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
    """A `model_class` from the folder or hub name `name`; no weight may be missing.

    Raises:
        UserError: naming the flag `argument`: nothing there, another kind of model, missing
            weights.
    """
    try:
        loaded: Any = model_class.from_pretrained(
            name,
            output_loading_info=True,
            dtype=weight_dtype(arguments.torch_dtype),
            revision=arguments.model_revision,
            token=arguments.token,
            cache_dir=arguments.cache_dir,
            **options,
        )
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{argument}: cannot load {name!r} as {model_class.__name__} ({error})"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{argument}: {name!r} holds no {model_class.__name__}: {len(missing)} weights are "
            f"missing, among them {', '.join(missing[:3])}"
        )
    check_finite(model.named_parameters(), f"{argument} ({name})")
    return model


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
        try:
            base = config_class.from_pretrained(
                arguments.config_name,
                cache_dir=arguments.cache_dir,
                revision=arguments.model_revision,
                token=arguments.token,
            )
        except OSError as error:
            raise UserError(
                f"config_name: cannot load {arguments.config_name!r} ({error})"
            ) from error
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
