"""Error messages with the names of flags in place of those of Python arguments."""

import argparse
import re

__all__ = ["with_flag_names"]

# What training calls an argument, and the flags by which commands take it.
OTHER_NAMES = {
    "train_file": ("data", "text"),
    "dataset_name": ("data", "text"),
    "tokenizer_name": ("tokenizer",),
}


def with_flag_names(message: str, args: argparse.Namespace) -> str:
    """`message` with ``--num-samples`` in place of ``num_samples``, for every flag in `args`.

    A name without underscore may be an ordinary word. It is replaced only as the first word of the
    message, where errors name the argument; so is a name that the command has under another.
    """

    def flag(match: re.Match[str]) -> str:
        name = match.group()
        is_first = match.start() == 0
        names = (name, *(OTHER_NAMES.get(name, ()) if is_first else ()))
        found = next((own for own in names if hasattr(args, own)), "")
        is_flag = found and ("_" in found or is_first)
        return f"--{found.replace('_', '-')}" if is_flag else name

    return re.sub(r"(?<![\w./-])[a-z]+(_[a-z]+)*(?![\w./-])", flag, message)
