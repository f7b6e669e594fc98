"""Checkpoints that are known to be whole (`calm.integrity`).

A checkpoint without a manifest, or whose files do not match it, is renamed when the run resumes,
and the checkpoint before it is used. Only what a run has written is deleted, and no link is
followed.
"""

import json
import logging
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calm.errors import UserError
from calm.integrity import MANIFEST, MODEL_FILES, find_damage, listed_names, write_manifest
from calm.training.sharding.checkpoints import shard_damage

__all__ = [
    "CheckpointCompletion",
    "bytes_to_save",
    "check_space",
    "check_usable",
    "checkpoint_damage",
    "checkpoint_folders",
    "discard_checkpoints",
    "holds_weights_alone",
    "is_model_file",
    "last_good_checkpoint",
    "rotate_checkpoints",
    "set_aside_later",
    "step_of",
]

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"checkpoint-(\d+)")
SLACK = 1 << 20  # bytes of a checkpoint beside weights and optimizer
INCOMPLETE, LATER = "incomplete-", "later-"  # names of checkpoints that were set aside

# What every checkpoint holds beside the weights.
RECORD_FILES = (("protocol.json",), ("trainer_state.json",))
# What a run needs to go on: the optimizer's state, the schedule's, the generators'.
STATE_FILES = (
    ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    ("scheduler.pt",),
    ("rng_state*.pth",),
)
# Names that transformers, tokenizers and this package give to the files of a model.
MODEL_NAMES = """
config.json generation_config.json model*.safetensors model.safetensors.index.json protocol.json
tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt chat_template.* spiece.model
sentencepiece.bpe.model *_processor.json processor_config.json
"""
# Further names in a checkpoint.
STATE_NAMES = """
manifest.json .*.partial trainer_state.json training_args.bin optimizer.* optimizer_* scheduler.pt
scaler.pt rng_state*.pth pytorch_model* global_step* latest zero_to_fp32.py adapter_*
"""


def is_model_file(name: str) -> bool:
    """Whether a file of this name belongs to a saved model, rather than to the state of a run."""
    return any(fnmatch(name, pattern) for pattern in MODEL_NAMES.split())


def checkpoint_damage(folder: Path) -> str | None:
    """Why a run cannot go on from the checkpoint in `folder`, or None if it can."""
    return find_damage(folder, (*MODEL_FILES, *RECORD_FILES, *STATE_FILES)) or shard_damage(folder)


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    found = [
        (int(match.group(1)), folder)
        for folder in output_dir.glob("checkpoint-*")
        if folder.is_dir() and (match := FOLDER.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(found)]


def last_good_checkpoint(output_dir: Path, *, set_aside: bool = True) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    Args:
        output_dir: folder of the run.
        set_aside: rename newer, damaged ones to ``incomplete-...``, so that nothing mistakes them
            for checkpoints.

    Raises:
        UserError: with `set_aside`, a newer one holds weights alone.
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        reason = checkpoint_damage(folder)
        if reason is None:
            return folder
        if set_aside and holds_weights_alone(folder):
            raise UserError(
                f"output_dir: {folder} holds weights alone (save_only_model), from which no run "
                "can go on; pass --overwrite_output_dir to start afresh, or another output_dir "
                f"with --model_name_or_path {folder} to begin with these weights"
            )
        logger.warning("skipping checkpoint %s: %s", folder, reason)
        if set_aside:
            _set_aside(folder, INCOMPLETE)
    return None


def holds_weights_alone(folder: Path) -> bool:
    """Whether a run with ``save_only_model`` wrote this checkpoint, which is whole."""
    patterns = [pattern for row in STATE_FILES for pattern in row]
    has_state = any(fnmatch(path.name, name) for path in folder.iterdir() for name in patterns)
    return not has_state and find_damage(folder, (*MODEL_FILES, *RECORD_FILES)) is None


def step_of(checkpoint: Path) -> int:
    """The step after which a whole checkpoint was written, whatever its folder is called."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def set_aside_later(output_dir: Path, checkpoint: Path) -> None:
    """Set aside what comes after `checkpoint`, from which a run goes on: it is of another course.

    The run would take it for its own newest: keep it, delete its own, and resume there.
    """
    step = step_of(checkpoint)
    for folder in checkpoint_folders(output_dir):
        if int(folder.name.rpartition("-")[2]) > step and not folder.samefile(checkpoint):
            logger.warning("%s comes after step %d, where this run begins", folder, step)
            _set_aside(folder, LATER)


def _set_aside(folder: Path, prefix: str) -> None:
    """Rename `folder`; what was set aside under that name before gets a number."""
    target, count = folder.with_name(f"{prefix}{folder.name}"), 1
    while target.exists() or target.is_symlink():
        count += 1
        target = folder.with_name(f"{prefix}{folder.name}-{count}")
    folder.rename(target)
    logger.warning("set aside as %s; it can be deleted", target)


def check_usable(folder: Path) -> Path:
    """`folder` if it holds a whole checkpoint, for a checkpoint that the user named."""
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {folder}")
    if reason := checkpoint_damage(folder):
        raise UserError(f"resume_from_checkpoint: {folder} cannot be used: {reason}")
    return folder


def rotate_checkpoints(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; the newest and the `best` always stay."""
    if not limit or limit <= 0:
        return
    folders = checkpoint_folders(output_dir)
    protected = {folders[-1].name} if folders else set()
    if best is not None:
        protected.add(Path(best).name)
    surplus = len(folders) - max(limit, len(protected))
    free = [folder for folder in folders if folder.name not in protected]
    for folder in free[: max(0, surplus)]:
        if (reason := _not_ours(folder)) is None:
            _delete(folder)
        else:
            logger.warning("keeping %s: %s", folder, reason)


def discard_checkpoints(output_dir: Path) -> None:
    """Delete all checkpoints of a run that is to start afresh.

    Raises:
        UserError: a folder named like a checkpoint is a link, or holds what no run has written;
            then nothing is deleted.
    """
    folders = checkpoint_folders(output_dir)
    for folder in folders:
        if reason := _not_ours(folder):
            raise UserError(
                f"overwrite_output_dir would delete {folder}, but {reason}; move it away, or "
                "choose another output_dir"
            )
    for folder in folders:
        _delete(folder)


def _not_ours(folder: Path) -> str | None:
    """Why `folder` was not written by a run, or None if it was."""
    if folder.is_symlink():
        return "it is a link"
    # Tokenizers have files of many names, and of code: all of them are listed once it is complete.
    names = {*f"{MODEL_NAMES} {STATE_NAMES}".split(), *listed_names(folder)}
    for path in folder.iterdir():
        is_known = any(fnmatch(path.name, pattern) for pattern in names)
        if path.is_symlink() or not is_known:
            return f"{path.name} in it was not written by a training run"
    return None


def _delete(folder: Path) -> None:
    logger.info("deleting checkpoint %s", folder)
    # The manifest goes first: a deletion cut short leaves nothing that looks whole.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def bytes_to_save(model: nn.Module, optimizer: Optimizer | None) -> int:
    """Size of the weights, and of what the optimizer, if one is given, knows so far."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        states: Any = optimizer.state.values()
        values = [value for state in states for value in state.values()]
        tensors += [value for value in values if isinstance(value, Tensor)]
    return SLACK + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_space(folder: Path, needed: int) -> None:
    """Raise `UserError` if the disk of `folder` has no `needed` bytes free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        good = last_good_checkpoint(folder, set_aside=False)
        raise UserError(
            f"output_dir: no space left in {folder}: saving needs {needed / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free; the last good checkpoint is {good or 'none'}"
        )


class CheckpointCompletion(TrainerCallback):
    """Gives every checkpoint its manifest, and deletes old checkpoints once the new one is whole.

    The best one is checked before a run begins and before it ends by loading that.

    Args:
        limit: how many checkpoints stay, see `rotate_checkpoints`; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the best checkpoint of a run that goes on."""
        _check_best(args, state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint that all processes have just written."""
        processes: Any = args.distributed_state
        processes.wait_for_everyone()
        if args.should_save:
            output_dir = Path(str(args.output_dir))
            write_manifest(output_dir / f"checkpoint-{state.global_step}")
            rotate_checkpoints(output_dir, self.limit, state.best_model_checkpoint)
        processes.wait_for_everyone()
        if control.should_training_stop:
            _check_best(args, state)


def _check_best(args: TrainingArguments, state: TrainerState) -> None:
    """Raise `UserError` if the best checkpoint, which the run will end with, is damaged."""
    best = state.best_model_checkpoint
    if args.load_best_model_at_end and best and (reason := find_damage(Path(best))):
        raise UserError(
            f"load_best_model_at_end: {best} cannot be loaded: {reason}; start again without this "
            "flag to end with the last weights"
        )
