"""The flag ``config_overrides``, such as ``hidden_size=1024,num_mlp_layers=4``.

The published scripts change a configuration in place. Fields that were derived from others then
keep their old values (``head_dim``, ``num_key_value_heads``). Here a new configuration is built.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from transformers import PreTrainedConfig

from calm.errors import UserError

__all__ = ["build_config", "close_names", "parse_overrides"]

Config = TypeVar("Config", bound=PreTrainedConfig)

TRUE, FALSE, NONE = ("true", "yes", "1"), ("false", "no", "0"), ("none", "null")


def close_names(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean a, b?`` for the names of `known` close to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def parse_overrides(text: str | None) -> dict[str, str]:
    """``"a=1,b=x"`` to ``{"a": "1", "b": "x"}``; later entries win."""
    overrides = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise UserError(
                f"config_overrides: expected name=value pairs with commas between, got {entry!r}"
            )
        overrides[name.strip()] = value.strip()
    return overrides


def build_config(
    config_class: type[Config],
    overrides: Mapping[str, str],
    base: Config | None = None,
    extras: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> Config:
    """A new `config_class`: `overrides` replace `fields`, which replace those of `base`.

    Args:
        config_class: a configuration whose annotated fields give the overrides their types.
        overrides: from `parse_overrides`.
        base: gives the other fields; None for the defaults of the class.
        extras: fields that the constructor takes without an annotation, with their types.
        fields: values that are known already, such as the vocabulary size.

    Raises:
        UserError: an unknown name (with close ones) or a value of the wrong type.
    """
    known = {**extras, **_field_types(config_class)}
    typed = {}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(
                f"config_overrides: {config_class.__name__} has no field {name!r}"
                + close_names(name, known)
            )
        typed[name] = _convert(name, value, known[name])
    chosen = {**_base_fields(base, fields.keys() | typed.keys()), **fields, **typed}
    try:
        return config_class(**chosen)
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a wrong field happens to cause
        reason = error.__cause__ or error
        raise UserError(f"config_overrides: no {config_class.__name__}: {reason}") from error


def _field_types(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Annotations of the fields that describe the architecture."""
    bookkeeping = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = dataclasses.fields(config_class)
    return {field.name: field.type for field in fields if field.name not in bookkeeping}


def _base_fields(base: PreTrainedConfig | None, replaced: typing.Collection[str]) -> dict[str, Any]:
    """Fields of `base`, without those that have to be derived from the `replaced` ones again."""
    if base is None:
        return {}
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    if {"hidden_size", "num_attention_heads"} & set(replaced):
        fields.pop("head_dim", None)
    heads = fields.get("num_attention_heads")
    if "num_attention_heads" in replaced and fields.get("num_key_value_heads") == heads:
        fields.pop("num_key_value_heads", None)
    return fields


def _convert(name: str, value: str, kind: Any) -> Any:
    """`value` as the first type of the annotation `kind` that it fits."""
    lowered = value.lower()
    for option in _options(kind):
        if option is type(None) and lowered in NONE:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is bool and lowered in TRUE + FALSE:
            return lowered in TRUE
        if option in (int, float):
            try:
                return option(value)
            except ValueError:
                continue
        if option is str:
            return value
    raise UserError(f"config_overrides: {name} expects {_describe(kind)}, got {value!r}")


def _options(kind: Any) -> list[Any]:
    """Members of a union, None first and strings last, so that a value gets the narrowest type."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    members = list(typing.get_args(kind)) if is_union else [kind]
    order = [type(None), bool, int, float]
    return sorted(
        members, key=lambda member: order.index(member) if member in order else len(order)
    )


def _describe(kind: Any) -> str:
    words = []
    for option in _options(kind):
        if typing.get_origin(option) is Literal:
            words += [repr(choice) for choice in typing.get_args(option)]
        else:
            words.append(
                "none" if option is type(None) else getattr(option, "__name__", str(option))
            )
    return " or ".join(words)
