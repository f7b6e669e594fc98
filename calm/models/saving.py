"""Saving a trained model without what training alone needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

__all__ = ["without_training_parts"]

# Parts of models, and the field of the configuration that is 0 where there is no such part.
PARTS = {"token_readout": "token_loss_weight", "alignment": "alignment_weight"}


@contextmanager
def without_training_parts(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile `model` is saved as one that never had a readout or an alignment.

    A readout stays with ``keep_token_readout``. Another model is saved as it is.
    """
    config: Any = model.config
    found = {part for part in PARTS if getattr(model, part, None) is not None}
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
