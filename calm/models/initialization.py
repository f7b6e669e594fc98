"""Initial weights that a configuration can choose instead of the published ones."""

from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

__all__ = ["initialize"]

FAN_IN_GAIN = 0.7


def initialize(module: nn.Module, config: PreTrainedConfig) -> None:
    """Reinitialise one linear or embedding as `config` says; loaded weights are kept.

    ``initializer="fan_in"``: linear weights N(0, (0.7)² / fan_in). ``embedding_std``: embeddings
    N(0, embedding_std²). A configuration without these fields keeps transformers' initial weights,
    N(0, initializer_range²).
    """
    if isinstance(module, nn.Linear) and getattr(config, "initializer", "normal") == "fan_in":
        init.normal_(module.weight, std=FAN_IN_GAIN / module.in_features**0.5)
    embedding_std = getattr(config, "embedding_std", None)
    is_loaded = getattr(getattr(module, "weight", None), "_is_hf_initialized", False)
    if isinstance(module, nn.Embedding) and embedding_std is not None and not is_loaded:
        init.normal_(module.weight, std=embedding_std)
        if module.padding_idx is not None:
            init.zeros_(
                module.weight[module.padding_idx]
            )  # a slice lacks the mark of a loaded weight
