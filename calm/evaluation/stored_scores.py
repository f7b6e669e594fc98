"""Scores of a text in a file, so that a run which was interrupted need not score it again."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calm.errors import UserError
from calm.evaluation.scores import TextScores

__all__ = ["load_scores", "save_scores"]

TENSORS = ("offsets", "terms", "blocks", "text")


def save_scores(scores: TextScores, path: Path) -> None:
    """Write `scores`, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    tensors = {name: getattr(scores, name).contiguous() for name in TENSORS}
    record = {"protocol": scores.protocol, "names": scores.names}
    save_file(tensors, partial, {name: json.dumps(value) for name, value in record.items()})
    os.replace(partial, path)


def load_scores(path: Path) -> TextScores:
    """What `save_scores` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        return TextScores(**tensors, protocol=record["protocol"], names=tuple(record["names"]))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to score again") from error
