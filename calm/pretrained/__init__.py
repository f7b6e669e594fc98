"""Models that come with the package, a folder each (docs/pretrained.md).

`make pretrained` writes them.
"""

import os
from pathlib import Path

from calm.errors import UserError

__all__ = ["DEFAULT", "PRETRAINED", "packaged", "pretrained_path", "shown_name"]

DEFAULT = "calm-docstrings"  # what commands take without --model
PRETRAINED = (DEFAULT, f"{DEFAULT}-baseline")
FOLDER = Path(__file__).parent


def pretrained_path(name: str = DEFAULT) -> Path:
    """The folder of a model that comes with the package: for ``from_pretrained`` of any class.

    Args:
        name: one of `PRETRAINED`.

    Raises:
        UserError: another name; a copy of the package without weights.
    """
    if name not in PRETRAINED:
        raise UserError(f"name must be one of {', '.join(PRETRAINED)}, got {name!r}")
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} should come with the package, but this copy of it lacks {folder}: install "
            "calm-lm again, or run `make pretrained` in a checkout (about an hour)"
        )
    return folder


def packaged(name: str | os.PathLike[str]) -> str:
    """`name`, or the folder that comes with the package if it is one of `PRETRAINED`.

    A folder of that name where one stands comes first, as it does before the hub.
    """
    text = os.fspath(name)
    return str(pretrained_path(text)) if text in PRETRAINED and not Path(text).exists() else text


def shown_name(folder: str) -> str:
    """What a table calls the model in `folder`: its name if it comes with the package."""
    path = Path(folder)
    return path.name if path.parent == FOLDER and path.name in PRETRAINED else folder
