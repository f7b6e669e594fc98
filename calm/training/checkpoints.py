"""Checkpoints that are known to be whole.

A checkpoint is complete once it has a manifest: a list of its files and their sizes, written after
all of them and moved into place in one step. A run that was killed, or whose disk filled up, leaves
a folder without a manifest, or with files that do not match it. When the run resumes, such a folder
is renamed, and the checkpoint before it is used.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calm.errors import UserError

__all__ = [
    "MANIFEST",
    "CheckpointCompletion",
    "check_usable",
    "checkpoint_folders",
    "damage",
    "discard_checkpoints",
    "last_good_checkpoint",
    "rotate_checkpoints",
    "write_atomically",
    "write_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FOLDER = re.compile(r"checkpoint-(\d+)")
SET_ASIDE = "incomplete-"


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def write_manifest(folder: Path) -> None:
    """Declare the checkpoint in `folder` complete, once its files have reached the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be used, or None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is unreadable"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} holds {path.stat().st_size} bytes instead of {size}"
    return None


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
    """
    for folder in reversed(checkpoint_folders(output_dir)):
        reason = damage(folder)
        if reason is None:
            return folder
        logger.warning("skipping checkpoint %s: %s", folder, reason)
        if set_aside:
            _set_aside(folder)
    return None


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"{SET_ASIDE}{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    logger.warning("set aside as %s; it can be deleted", target)


def check_usable(folder: Path) -> Path:
    """`folder` if it holds a whole checkpoint, for a checkpoint that the user named."""
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {folder}")
    if reason := damage(folder):
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
    _delete(folders, surplus, lambda folder: folder.name not in protected)


def discard_checkpoints(output_dir: Path) -> None:
    """Delete all checkpoints of a run that is to start afresh."""
    folders = checkpoint_folders(output_dir)
    _delete(folders, len(folders), lambda folder: True)


def _delete(folders: list[Path], count: int, is_free: Callable[[Path], bool]) -> None:
    for folder in [folder for folder in folders if is_free(folder)][: max(0, count)]:
        logger.info("deleting checkpoint %s", folder)
        # The manifest goes first: a deletion cut short leaves nothing that looks whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


class CheckpointCompletion(TrainerCallback):
    """Gives every checkpoint its manifest, and deletes old checkpoints once the new one is whole.

    Args:
        limit: how many checkpoints stay, see `rotate_checkpoints`; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

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
