"""Checks that the configurations share: numbers, sizes of a backbone, one kind of error."""

import dataclasses
import math
from functools import wraps
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from calm.errors import UserError

__all__ = [
    "check_backbone",
    "check_tempered_range",
    "check_tempered_spread",
    "checked",
    "require",
    "require_numbers",
    "require_positive",
]

Config = TypeVar("Config", bound=PreTrainedConfig)


def checked(config_class: type[Config]) -> type[Config]:
    """`strict`, whose errors are `UserError`s: which field, what was expected, what came."""
    strict_class = strict(config_class)
    strict_init = strict_class.__init__

    @wraps(strict_init)
    def __init__(self: Config, **fields: Any) -> None:
        try:
            strict_init(self, **fields)
        except UserError as error:
            raise UserError(f"{config_class.__name__}: {error}") from error
        except StrictDataclassError as error:
            raise UserError(f"{config_class.__name__}: {error.__cause__ or error}") from error

    strict_class.__init__ = __init__  # type: ignore[assignment,method-assign] # a checked init
    return strict_class


def require(is_valid: bool, message: str) -> None:
    """Raise `UserError` with `message` unless `is_valid`."""
    if not is_valid:
        raise UserError(message)


def require_numbers(config: PreTrainedConfig) -> None:
    """Every number is finite, and the activation exists."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        require(is_finite, f"{field.name} must be a finite number, got {value}")
    require(
        config.hidden_act in ACT2FN,
        f"hidden_act must be an activation of transformers, such as silu, gelu or relu; got "
        f"{config.hidden_act!r}",
    )
    deviation = getattr(config, "embedding_std", None)
    require(deviation is None or deviation >= 0, f"embedding_std must be >= 0, got {deviation}")


def check_backbone(config: LlamaConfig) -> None:
    """The sizes of a Llama backbone fit together; raises `UserError`."""
    require_numbers(config)
    require_positive(
        config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    )  # fmt: skip
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    require(
        heads % (shared or 1) == 0,
        f"num_key_value_heads must divide num_attention_heads, {heads}, got {shared}",
    )
    require(
        (config.head_dim or 0) % 2 == 0,
        f"head_dim must be even for rotary positions, got {config.head_dim}: choose another "
        "hidden_size or num_attention_heads",
    )
    dropout = config.attention_dropout or 0
    require(0 <= dropout < 1, f"attention_dropout must lie in [0, 1), got {dropout}")


def check_tempered_range(bounds: list[int | float] | None, head_type: str | None) -> None:
    """The temperatures of a tempered head lie in (0, 1), and the head is one that can have it."""
    if bounds is None:
        return
    require(
        len(bounds) == 2 and 0 < bounds[0] <= bounds[1] < 1,
        f"tempered_range must be two temperatures 0 < least <= largest < 1, got {bounds}",
    )
    require(
        head_type in (None, "energy"),
        f"tempered_range must be None for the {head_type} head: an energy head alone can have "
        "learned temperatures",
    )


def check_tempered_spread(
    knots: list[list[float]] | None, bounds: list[int | float] | None
) -> None:
    """Pairs of increasing temperatures and positive factors, of a model with a tempered head."""
    if knots is None:
        return
    require(bounds is not None, f"tempered_spread needs a tempered_range, got {knots} without one")
    is_pairs = bool(knots) and all(len(knot) == 2 and min(knot) > 0 for knot in knots)
    temperatures = [knot[0] for knot in knots]
    require(
        is_pairs and temperatures == sorted(set(temperatures)),
        "tempered_spread must be pairs [T, factor] of positive numbers with increasing T, got "
        f"{knots}",
    )


def require_positive(config: PreTrainedConfig, *names: str) -> None:
    """The fields `names` are at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} must be at least 1, got {value}")
