"""Error messages with the names of flags in place of those of Python arguments."""

import argparse
import re

__all__ = ["with_flag_names"]


def with_flag_names(message: str, args: argparse.Namespace) -> str:
    """`message` with ``--num-samples`` in place of ``num_samples``, for every flag in `args`.

    A name without underscore may be an ordinary word. It is replaced only as the first word of the
    message, where errors name the argument.
    """

    def flag(match: re.Match[str]) -> str:
        name = match.group()
        is_flag = hasattr(args, name) and ("_" in name or match.start() == 0)
        return f"--{name.replace('_', '-')}" if is_flag else name

    return re.sub(r"(?<![\w./-])[a-z]+(_[a-z]+)*(?![\w./-])", flag, message)
