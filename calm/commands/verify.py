"""`calm verify`: whether the files of a run, a model or a text are those that were written."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm verify runs/calm                  the model and every checkpoint of a run
  calm verify runs/calm/checkpoint-500   one checkpoint
  calm verify runs/demo                  all models of the demo
  calm verify runs/text                  what calm prepare wrote

Compares sizes and hashes with manifest.json, which is written last, and looks for weights that are
not finite. The exit status is 1 if anything is damaged. Nothing is changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="of a run, a checkpoint, a model, a prepared text, or of several of them",
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each set of weights and each text; 1 if any is damaged."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; FOLDER takes that of a run, a checkpoint or a model")
    found = dict(_examine(folder)) or {
        path: reason
        for inside in sorted(folder.iterdir())
        if inside.is_dir()
        for path, reason in _examine(inside)
    }
    if not found:
        raise UserError(
            f"{folder} holds neither a model, a checkpoint of a training run nor a prepared text"
        )
    width = max(len(str(path)) for path in found)
    for path, reason in found.items():
        print(f"{path!s:{width}}  {'damaged: ' + reason if reason else 'whole'}")
    return int(any(found.values()))


def _examine(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every set of weights in `folder`, or its prepared text, with what is wrong with it."""
    from calm.data.manifest import DESCRIPTION, is_prepared
    from calm.integrity import MANIFEST, find_damage, find_non_finite, saved_weights
    from calm.training.checkpoints.complete import (
        FOLDER,
        checkpoint_damage,
        checkpoint_folders,
        holds_weights_alone,
    )

    if is_prepared(folder):
        yield folder, find_damage(folder, required=((DESCRIPTION,),))
        return
    is_checkpoint = FOLDER.fullmatch(folder.resolve().name)
    checks = dict.fromkeys(checkpoint_folders(folder), checkpoint_damage)
    if is_checkpoint:
        checks[folder] = checkpoint_damage
    elif (folder / MANIFEST).is_file() or any(folder.glob("*.safetensors")):
        checks[folder] = find_damage
    for path, check in checks.items():
        reason = check(path)
        if reason and check is checkpoint_damage and holds_weights_alone(path):
            reason = None
        if reason is None and (name := find_non_finite(saved_weights(path))):
            reason = f"weight {name} is not finite"
        yield path, reason
