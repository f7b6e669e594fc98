"""Checkpoints whose weights lie in shards: read by any number of processes, or made whole.

accelerate writes them, by `torch.distributed.checkpoint`: a folder for the model and one for the
optimizer, in each a file of every process and ``.metadata``, which says where the parts of a weight
are. Nothing that is read here runs code that a file brings.
"""

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from calm.errors import UserError

__all__ = [
    "has_shards",
    "load_model_shards",
    "load_optimizer_shards",
    "save_description",
    "shard_damage",
    "shard_shapes",
]

# accelerate's names of the folders, and of what they hold.
MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
METADATA = ".metadata"
# What a description of shards is made of, and no other name: modules hold functions, too.
PARTS = "torch.distributed.checkpoint.metadata"
KNOWN = {
    *((PARTS, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
}  # fmt: skip


def has_shards(folder: Path) -> bool:
    """Whether the weights of the checkpoint in `folder` lie in shards."""
    return (folder / MODEL).is_dir()


def shard_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all weights of a checkpoint in shards.

    Raises:
        UserError: there are none, or their description cannot be read.
    """
    start = "model."
    return {
        name.removeprefix(start): list(entry.size)
        for name, entry in _metadata(folder / MODEL).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(start)
    }


def shard_damage(folder: Path) -> str | None:
    """Why the shards of the checkpoint in `folder` cannot be read, or None if they can.

    Every part of a weight and of the optimizer's state must lie within its file.
    """
    if not has_shards(folder):
        return None
    for name in (MODEL, OPTIMIZER):
        try:
            places: Any = _metadata(folder / name).storage_data
        except UserError as error:
            return str(error)
        for place in places.values():
            path = folder / name / place.relative_path
            if not path.is_file() or path.stat().st_size < place.offset + place.length:
                return f"{name}/{place.relative_path} is missing or cut"
    return None


def load_model_shards(folder: Path, model: nn.Module) -> None:
    """Give `model`, sharded or not, the weights of the checkpoint in `folder`.

    All processes must call it.

    Raises:
        UserError: weights that are missing, have no place or another shape; damaged files.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    own, saved = {name: list(value.shape) for name, value in state.items()}, shard_shapes(folder)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in sorted(own.keys() | saved.keys()):
        is_ignored = name not in own and any(re.search(pattern, name) for pattern in ignored)
        if own.get(name) != saved.get(name) and not is_ignored:
            raise UserError(
                f"{folder}: the weight {name} must have shape {own.get(name)}, as in this "
                f"{type(model).__name__.removeprefix('FSDP')}; got {saved.get(name)} (None: there "
                "is none)"
            )
    _load({"model": state}, folder / MODEL)
    set_model_state_dict(model, state)


def load_optimizer_shards(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Give `optimizer`, of the weights of `model`, the state of the checkpoint in `folder`.

    Likewise.
    """
    plain: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    state = {"optimizer": get_optimizer_state_dict(model, plain)}
    _load(state, folder / OPTIMIZER)
    set_optimizer_state_dict(model, plain, state["optimizer"])


def save_description(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _load(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` from the shards in `folder`, an error in any process is one in all."""
    _metadata(folder)
    is_alone = not (dist.is_available() and dist.is_initialized())
    reader = dcp.FileSystemReader(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist says so
            dcp.load(state, storage_reader=reader, planner=_DataPlanner(), no_dist=is_alone)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = " ".join(str(cause).split())
        raise UserError(f"{folder} cannot be read (process {rank}): {reason}") from error


class _DataPlanner(DefaultLoadPlanner):
    """Reads what is no tensor as data: torch would run what a file asks for."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        copied = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), copied)
        copied.seek(0)
        super().load_bytes(read_item, copied)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what a description of shards is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _metadata(folder: Path) -> Metadata:
    """The description of the shards in `folder`, which has been found to be nothing else."""
    path = folder / METADATA
    try:
        with path.open("rb") as handle:
            found = _MetadataUnpickler(handle).load()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no shards: there is no {METADATA} in it") from None
    except (
        OSError, ValueError, EOFError, AttributeError, LookupError, TypeError, ImportError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged, or no description of shards ({error})") from error
    if not isinstance(found, Metadata):
        raise UserError(f"{path} must describe shards, got {type(found).__name__}")
    return found
