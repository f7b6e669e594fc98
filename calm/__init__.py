"""Continuous autoregressive language models.

A name below is imported when it is first used, so that `calm --help` need not wait for torch; the
first one registers all models with transformers' `AutoConfig` and `AutoModel`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.configuration import AutoencoderConfig, CALMConfig
    from calm.models import (
        Autoencoder,
        BaselineTransformer,
        DiffusionTransformer,
        EnergyTransformer,
        FlowTransformer,
    )
    from calm.pretrained import pretrained_path

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BaselineTransformer",
    "CALMConfig",
    "DiffusionTransformer",
    "EnergyTransformer",
    "FlowTransformer",
    "pretrained_path",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "pretrained_path":
        return import_module("calm.pretrained").pretrained_path
    models = import_module("calm.models")  # registers them, whichever name is asked for
    return getattr(import_module("calm.configuration") if name.endswith("Config") else models, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
