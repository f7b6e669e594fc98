"""The flags that name prompts: on the command line, in files, from a pipe, typed at a terminal."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from calm.errors import UserError

__all__ = ["add_prompt_arguments", "is_interactive", "read_prompts"]

STANDARD_INPUT = "-"
INTRODUCTION = "Type a prompt and press Enter; Ctrl-D ends, Ctrl-C stops."
MARK = "> "


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what to continue."""
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be repeated. Without a prompt they are typed in, or read from "
        "a pipe",
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="file with a text to continue, '-' for standard input; may be repeated",
    )


def is_interactive(args: argparse.Namespace) -> bool:
    """Whether prompts are typed in, at a terminal."""
    return not (args.prompt or args.prompt_file) and sys.stdin.isatty()


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    """Every prompt, in order; without the newline that ends a file."""
    if is_interactive(args):
        yield from _typed()
        return
    yield from args.prompt
    files = args.prompt_file or ([] if args.prompt else [STANDARD_INPUT])
    for name in files:
        yield _read(name).removesuffix("\n")


def _read(name: str) -> str:
    try:
        if name == STANDARD_INPUT:
            return sys.stdin.read()
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {name} is not UTF-8 text: {error}") from error


def _typed() -> Iterator[str]:
    """Lines until Ctrl-D."""
    print(INTRODUCTION, file=sys.stderr)
    while True:
        try:
            yield input(MARK)
        except EOFError:
            print(file=sys.stderr)
            return
