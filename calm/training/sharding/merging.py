"""A model's folder made of a checkpoint, whose weights may lie in shards."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from calm.errors import UserError
from calm.integrity import check_finite, write_manifest
from calm.models import MODEL_CLASSES, Autoencoder, BaselineTransformer
from calm.models.loading import load_checked, load_config, load_kind
from calm.models.saving import without_training_parts
from calm.training.checkpoints.complete import (
    bytes_to_save,
    check_space,
    checkpoint_damage,
    holds_weights_alone,
    is_model_file,
)
from calm.training.sharding.checkpoints import has_shards, load_model_shards

__all__ = ["merge_checkpoint"]

ARGUMENT = "CHECKPOINT"


def merge_checkpoint(checkpoint: Path, output: Path) -> PreTrainedModel:
    """Write the model of `checkpoint` to `output`, whole, as the end of its run would; the model.

    The folder holds safetensors, configuration, tokenizer, protocol and a manifest. What training
    alone needs is left out.

    Args:
        checkpoint: folder of a checkpoint, in shards or not.
        output: folder, new or empty.

    Raises:
        UserError: the checkpoint is damaged or incomplete, or no model of this package; `output`
            holds something; the disk is full.
    """
    if not checkpoint.is_dir():
        raise UserError(f"{ARGUMENT}: there is no folder {checkpoint}")
    reason = checkpoint_damage(checkpoint)
    if reason and not holds_weights_alone(checkpoint):
        raise UserError(f"{ARGUMENT}: {checkpoint} cannot be merged: {reason}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output must be a new or an empty folder; {output} holds something")
    model = _load(checkpoint)
    check_space(output, bytes_to_save(model, None))
    with without_training_parts(model):
        model.save_pretrained(output)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and is_model_file(path.name) and not _is_written(path.name, output):
            shutil.copyfile(path, output / path.name)
    write_manifest(output, is_model_file)
    return model


def _is_written(name: str, output: Path) -> bool:
    """Whether `save_pretrained` has taken care of a file of this name."""
    return name.startswith("model") or (output / name).exists()


def _load(checkpoint: Path) -> PreTrainedModel:
    """The model of `checkpoint` on the CPU, in the dtype of its weights."""
    kind = load_kind(str(checkpoint), ARGUMENT)
    classes: dict[str, Any] = {
        **MODEL_CLASSES, "baseline": BaselineTransformer, "autoencoder": Autoencoder,
    }  # fmt: skip
    if kind not in classes:
        raise UserError(f"{ARGUMENT}: {checkpoint} holds a {kind!r} model, none of this package")
    model_class = classes[kind]
    if not has_shards(checkpoint):
        return load_checked(model_class, str(checkpoint), ARGUMENT, dtype="auto")
    config = load_config(model_class.config_class, str(checkpoint), ARGUMENT)
    model: Any = model_class(config)
    model.to(dtype=config.dtype)
    load_model_shards(checkpoint, model)
    check_finite(model.named_parameters(), f"{ARGUMENT} ({checkpoint})")
    return model.eval()
