"""Saving a trained model without what training alone needs, and in few bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calm.integrity import find_non_finite

__all__ = ["save_in", "without_training_parts"]

# Parts of models, and the field of the configuration that is 0 where there is no such part.
PARTS = {"token_readout": "token_loss_weight", "alignment": "alignment_weight"}


@contextmanager
def without_training_parts(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile `model` is saved as one that never had a readout or an alignment.

    A readout stays with ``keep_token_readout``. Another model is saved as it is.
    """
    config: Any = model.config
    found = {part for part, field in PARTS.items() if getattr(config, field, 0)}
    if getattr(config, "keep_token_readout", False):
        found -= {"token_readout"}
    ignored: Any = model._keys_to_ignore_on_save
    weights = {PARTS[part]: getattr(config, PARTS[part]) for part in found}
    if found:
        starts = tuple(f"{part}." for part in found)
        model._keys_to_ignore_on_save = {n for n in model.state_dict() if n.startswith(starts)}
    for name in weights:
        setattr(config, name, 0)
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = ignored
        for name, weight in weights.items():
            setattr(config, name, weight)


def save_in(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Save `model` with weights in `dtype`; loading converts them to the dtype that they have now.

    So a file holds half the bytes, and computes as before; weights are rounded once. The model
    itself is converted, too.

    Raises:
        ValueError: a weight beyond the range of `dtype`.
    """
    computed = model.dtype
    stored: Any = model
    stored.to(dtype)
    if name := find_non_finite(stored.named_parameters()):
        raise ValueError(f"dtype {dtype} does not reach as far as weight {name}: take bfloat16")
    with without_training_parts(stored):
        stored.save_pretrained(folder)
        stored.config.dtype = computed
        stored.config.save_pretrained(folder)
