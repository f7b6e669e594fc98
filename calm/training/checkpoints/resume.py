"""A job compared with the run that it takes over: one contract for all stages.

A checkpoint holds ``protocol.json``, the settings of its run. What decides which weights there are
(stage, tokenizer, autoencoder, shapes) must be the same. Any other setting that changes the numbers
of the run (text, seed, learning rate, loss, batch) must be the same, or be changed with
``--allow_changes``; the protocol then records old and new value with the step. How long to train,
how often to log and save, and where files lie may always change.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from calm.data.manifest import is_prepared
from calm.errors import UserError
from calm.integrity import saved_shapes
from calm.training.checkpoints.complete import checkpoint_folders, step_of
from calm.training.flags.arguments import JobArguments
from calm.training.sharding.checkpoints import has_shards, shard_shapes

__all__ = [
    "PROTOCOL",
    "OwnSettings",
    "Takeover",
    "check_output_folder",
    "model_settings",
    "read_protocol",
    "read_record",
]

PROTOCOL = "protocol.json"

# Entries of a protocol that must be the same.
FIXED = (
    "stage", "tokenizer_hash", "vocab_size", "patch_size", "start_token_id", "document_separator",
    "autoencoder", "teacher", "source", "optimizer", "training.fp16",
)  # fmt: skip
# Schedules that follow the losses, and what must be the same with them: nobody can tell which rate
# another base would have led to.
FOLLOWING = ("reduce_lr_on_plateau", "greedy")
RATES = ("training.learning_rate", "training.muon_learning_rate", "training.lr_scheduler")
# Entries that may differ: names of what is compared by its content, and how long to train.
FREE = (
    "tokenizer", "dataset", "train_files", "validation_files", "versions", "changes",
    "on_error", "skipped_documents",
    "train.blocks", "train.tokens", "train.tokens_per_character", "validation.blocks",
    "validation.tokens", "validation.tokens_per_character", "training.max_steps",
    "training.num_train_epochs", "training.max_train_seconds",
)  # fmt: skip
# How the sequences of a step are cut into micro-batches; their product is compared.
SPLIT = tuple(
    f"training.{name}"
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
)
# Fields of a configuration that change no number, or that the tokenizer decides.
UNCOMPARED = (
    "transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache",
    "ae_path", "bos_token_id", "eos_token_id", "pad_token_id", "head_recompute",
    "keep_token_readout",
)  # fmt: skip

Change = tuple[Any, Any]


def check_output_folder(arguments: JobArguments) -> None:
    """Refuse an output folder whose files the job would replace by those of another kind.

    Raises:
        UserError: it is the autoencoder's folder or a prepared text, another stage was trained in
            it, or the job reads what ``overwrite_output_dir`` would delete.
    """
    training, model = arguments.training, arguments.model
    if not training.do_train:
        return
    if model.ae_name_or_path and training.folder.resolve() == Path(model.ae_name_or_path).resolve():
        raise UserError(
            f"output_dir: {training.folder} is ae_name_or_path, whose files would be replaced; "
            "choose another folder"
        )
    for name in ("ae_name_or_path", "model_name_or_path", "teacher_name_or_path"):
        source = Path(str(getattr(model, name) or ""))
        is_inside = training.folder.resolve() in source.resolve().parents
        if training.overwrite_output_dir and is_inside and source.exists():
            raise UserError(
                f"overwrite_output_dir would delete checkpoints of {training.folder}, and {name} "
                f"is in it ({source}); choose another output_dir"
            )
    if is_prepared(training.folder):
        raise UserError(
            f"output_dir: {training.folder} holds a prepared text, whose files would be replaced; "
            "choose another folder"
        )
    stage = _stage_in(training.folder)
    if stage not in (None, arguments.stage.value) and not training.overwrite_output_dir:
        raise UserError(
            f"output_dir: {training.folder} holds a model of stage {stage!r}, this one is "
            f"{arguments.stage.value!r}; choose another folder, or pass --overwrite_output_dir"
        )


def _stage_in(folder: Path) -> str | None:
    """The stage that was last trained in `folder`, as far as its files can be read."""
    for place in (*reversed(checkpoint_folders(folder)), folder):
        try:
            if stage := read_protocol(place).get("stage"):
                return str(stage)
        except UserError:  # a damaged one is set aside, or written again
            continue
    return None


def read_protocol(folder: Path) -> dict[str, Any]:
    """``protocol.json`` in `folder`; empty if there is none, as in folders of other programs."""
    return read_record(folder, PROTOCOL)


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """The JSON file `name` that a run has left in `folder`; empty if there is none."""
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration of `model` as its file has it, without what is not compared."""

    def kept(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: kept(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in UNCOMPARED
        }

    return kept(json.loads(model.config.to_json_string()))


@dataclass(frozen=True)
class Takeover:
    """What a job takes over from a checkpoint, and what it changes.

    Attributes:
        checkpoint: folder.
        step: of the checkpoint.
        changes: names of settings with their old and new values.
    """

    checkpoint: Path
    step: int
    changes: dict[str, Change]

    @classmethod
    def check(
        cls,
        checkpoint: Path,
        protocol: dict[str, Any],
        model: PreTrainedModel,
        *,
        allow_changes: bool,
    ) -> "Takeover":
        """Compare a job with the run that wrote `checkpoint`.

        Args:
            checkpoint: folder of a whole checkpoint.
            protocol: of the job.
            model: of the job.
            allow_changes: whether settings that need not be the same may differ.

        Raises:
            UserError: naming every setting that must not differ, with both values.
        """
        saved = read_protocol(checkpoint)
        changes = dict(_changes(saved, protocol))
        fixed = _named(changes, FIXED)
        if any(_schedule(settings) in FOLLOWING for settings in (saved, protocol)):
            fixed |= _named(changes, RATES)
        if not fixed and (shapes := _shape_changes(checkpoint, model)):
            fixed = _named(changes, "model.") or shapes
        if fixed:
            raise UserError(
                f"output_dir: a run cannot go on from {checkpoint}: {_listed(fixed)}; choose "
                "another output_dir, or pass --overwrite_output_dir to start afresh"
            )
        step = step_of(checkpoint)
        if changes and not allow_changes:
            raise UserError(
                f"output_dir: {checkpoint} was written with other settings: {_listed(changes)}; "
                f"pass --allow_changes to go on with the new ones from step {step}, "
                "--overwrite_output_dir to start afresh, or choose another output_dir"
            )
        return cls(checkpoint, step, changes)

    def record(self) -> list[dict[str, Any]]:
        """The entry ``changes`` of the job's protocol: those of the past and the new ones."""
        past: list[dict[str, Any]] = read_protocol(self.checkpoint).get("changes", [])
        if not self.changes:
            return past
        named = {name: {"from": old, "to": new} for name, (old, new) in self.changes.items()}
        return [*past, {"step": self.step, **named}]

    def __str__(self) -> str:
        return _listed(self.changes)


def _named(changes: Mapping[str, Change], starts: str | tuple[str, ...]) -> dict[str, Change]:
    return {name: change for name, change in changes.items() if name.startswith(starts)}


def _schedule(protocol: dict[str, Any]) -> str | None:
    name: str | None = protocol.get("training", {}).get("lr_scheduler_type")
    return name


def _listed(changes: Mapping[str, Change]) -> str:
    return "; ".join(
        f"{name.removeprefix('training.')} was {old!r}, is {new!r}"
        for name, (old, new) in sorted(changes.items())
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of nested mappings under dotted names; a flag's own mapping is one value."""
    if not isinstance(value, dict) or name.startswith("training."):
        yield name, value
        return
    for key, entry in value.items():
        yield from _flat(entry, f"{name}.{key}" if name else key)


def _changes(saved: dict[str, Any], protocol: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """Settings that differ. What one of the two does not record is not compared."""
    old = dict(_flat(saved))
    new = dict(_flat(json.loads(json.dumps(protocol))))
    for name in sorted(old.keys() & new.keys()):
        is_free = any(name == free or name.startswith(f"{free}.") for free in FREE)
        if not is_free and name not in SPLIT and old[name] != new[name]:
            yield name, (old[name], new[name])
    yield from _split_changes(old, new)


def _split_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    """Whether the steps hold the same sequences, however they are cut into micro-batches."""
    if not all(name in settings for name in SPLIT for settings in (old, new)):
        return
    (old_split, old_size), (new_split, new_size) = _split(old), _split(new)
    # A last step that is not full is filled differently by one process and by several.
    is_even = isinstance(old.get("train.blocks"), int) and old["train.blocks"] % old_size == 0
    if old_size != new_size:
        yield "sequences_per_step", (old_size, new_size)
    elif old_split != new_split and not is_even:
        yield "batch, accumulation, processes", (old_split, new_split)


def _split(settings: dict[str, Any]) -> tuple[list[int], int]:
    sizes = [int(settings[name]) for name in SPLIT]
    return sizes, sizes[0] * sizes[1] * sizes[2]


def _shape_changes(checkpoint: Path, model: PreTrainedModel) -> dict[str, Change]:
    """The first weight that has another shape, or that only one of file and model has."""
    saved = (shard_shapes if has_shards(checkpoint) else saved_shapes)(checkpoint)
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    own = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name) and not (name in tied and name not in saved):
            return {f"weight {name}": (saved.get(name), own.get(name))}
    return {}


class OwnSettings(TrainerCallback):
    """Puts the job's settings of the optimizer in place of those that the checkpoint brought.

    Where nothing was changed, this changes nothing.

    Args:
        groups: settings of the optimizer's parameter groups, as the job made them.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        """Runs after the checkpoint is loaded; the schedule goes on from where it is."""
        if optimizer is None or not self.groups:
            return
        if not isinstance(lr_scheduler, LambdaLR):  # the rate is what the losses have made it
            for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
                group.update({**settings, "lr": group["lr"]})
            return
        step = lr_scheduler.last_epoch
        lr_scheduler.base_lrs = [settings["lr"] for settings in self.groups]
        for group, settings, factor in zip(
            optimizer.param_groups, self.groups, lr_scheduler.lr_lambdas, strict=True
        ):
            rate = settings["lr"] * factor(step)
            group.update(settings, initial_lr=settings["lr"], lr=rate)
        lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
