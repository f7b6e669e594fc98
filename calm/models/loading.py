"""Loading a model that a user has named: whatever is wrong with it is one error."""

import json
import os
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from calm.configuration import HEAD_TYPES, model_kind
from calm.errors import UserError, message_of
from calm.integrity import check_finite

__all__ = ["check_kind", "load_checked", "load_config", "load_kind", "on_meta"]

KINDS = (*HEAD_TYPES, "baseline", "autoencoder")

Model = TypeVar("Model", bound=PreTrainedModel)
Config = TypeVar("Config", bound=PreTrainedConfig)


def load_checked(model_class: type[Model], name: str, argument: str, **options: Any) -> Model:
    """A `model_class` from the folder or hub name `name`: each weight is found and has a place.

    transformers would leave missing weights random and drop those without a place.

    Args:
        model_class: of the model.
        name: folder or hub name.
        argument: the flag that `name` comes from, for messages.
        options: of `from_pretrained`.

    Raises:
        UserError: nothing there, damaged files, another kind of model, weights that are missing,
            not finite, or without a place in the configuration.
    """
    if any(Path(name).glob("pytorch_model_fsdp*")):
        raise UserError(
            f"{argument}: the weights in {name} lie in shards; make them whole first: calm merge "
            f"{name} --output DIR"
        )
    options["local_files_only"] = Path(name).is_dir()  # a folder leads to no hub
    try:
        with _quiet_transformers():
            loaded: Any = model_class.from_pretrained(name, output_loading_info=True, **options)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    except Exception as error:  # libraries raise whatever a broken file happens to cause
        raise UserError(
            f"{argument}: cannot load {name!r} as {model_class.__name__}: {_reason(error, name)}"
        ) from error
    model, info = loaded
    if missing := info["missing_keys"]:
        raise UserError(
            f"{argument}: {name} lacks {len(missing)} weights that {model_class.__name__} needs "
            f"({_some(missing)}): it is damaged, or another kind of model"
        )
    if unexpected := info["unexpected_keys"]:
        raise UserError(
            f"{argument}: {name} holds {len(unexpected)} weights for which its config.json has no "
            f"place in a {model_class.__name__} ({_some(unexpected)}): take the config.json that "
            "was saved with them"
        )
    check_finite(model.named_parameters(), f"{argument} ({name})")
    return model


def check_kind(folder: str | os.PathLike[str] | None, kinds: Collection[str], class_: type) -> None:
    """Raise `UserError` if `folder` holds one of our models that `class_`, of `kinds`, is not for.

    transformers would make all weights random, with a long report. What is no folder, or cannot be
    read, is left to it.
    """
    path = Path(str(folder)) / "config.json"
    try:
        kind = model_kind(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return
    if kind in KINDS and kind not in kinds:
        raise UserError(
            f"{folder} holds a model of kind {kind!r}, which {class_.__name__} does not load; it "
            f"loads {', '.join(kinds)}"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, and no report on weights: `load_checked` checks them itself."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def load_config(config_class: type[Config], name: str, argument: str, **options: Any) -> Config:
    """The configuration in the folder or hub name `name`, likewise."""
    with _reading(name, argument):
        return config_class.from_pretrained(name, local_files_only=Path(name).is_dir(), **options)


def load_kind(name: str, argument: str, **options: Any) -> str:
    """What the folder or hub name `name` holds, see `calm.configuration.model_kind`; likewise."""
    with _reading(name, argument):
        fields, _ = PreTrainedConfig.get_config_dict(
            name, local_files_only=Path(name).is_dir(), **options
        )
        return model_kind(fields)


@contextmanager
def _reading(name: str, argument: str) -> Iterator[None]:
    """Whatever is wrong with the files is a `UserError` that names the flag."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    except Exception as error:  # libraries raise whatever a broken file happens to cause
        raise UserError(f"{argument}: cannot load {name!r}: {_reason(error, name)}") from error


def on_meta(model_class: type[Model], config: PreTrainedConfig) -> Model:
    """The model without memory for its weights, to count them.

    Raises:
        UserError: sizes beyond what any machine can address.
    """
    try:
        with torch.device("meta"):
            return model_class(config)
    except UserError:
        raise
    except (RuntimeError, TypeError, OverflowError) as error:  # torch counts bytes in 64 bits
        raise UserError(
            f"the sizes of this {model_class.__name__} are out of range: {error}"
        ) from error


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _reason(error: BaseException, name: str) -> str:
    """What is wrong with the files, which transformers may hide behind an error of its own."""
    if isinstance(error, OSError) and not Path(name).exists():
        return f"there is no such folder, and the hub gave none ({message_of(error)})"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, pickle.UnpicklingError):
        cause = cause.__cause__ or cause.__context__
    return message_of(cause or error) or type(error).__name__
