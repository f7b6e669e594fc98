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

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BaselineTransformer",
    "CALMConfig",
    "DiffusionTransformer",
    "EnergyTransformer",
    "FlowTransformer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    models = import_module("calm.models")  # registers them, whichever name is asked for
    return getattr(import_module("calm.configuration") if name.endswith("Config") else models, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
