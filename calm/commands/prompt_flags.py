"""The flags that name prompts: on the command line, in files, from a pipe, typed at a terminal."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from calm.data.files import without_mark
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
    """Every prompt, in order; without byte-order mark and the newline that ends a file.

    Raises:
        UserError: a file is missing, or a prompt is no UTF-8. At a terminal that is printed, and
            the next one is read.
    """
    if is_interactive(args):
        yield from _typed()
        return
    for prompt in args.prompt:
        yield _checked(prompt, "--prompt")
    for name in args.prompt_file or ([] if args.prompt else [STANDARD_INPUT]):
        where = "standard input" if name == STANDARD_INPUT else f"--prompt-file {name}"
        try:
            text = sys.stdin.read() if name == STANDARD_INPUT else _read(Path(name))
        except UnicodeDecodeError as error:
            raise _no_utf8(where, error) from error
        yield _checked(text, where).removesuffix("\n")


def _read(path: Path) -> str:
    if not path.exists():
        raise UserError(f"--prompt-file: no file {path}")
    return path.read_text(encoding="utf-8")


def _checked(text: str, where: str) -> str:
    """`text`, in which Python may have kept bytes that are no UTF-8 as halves of surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_utf8(where, error) from error
    return without_mark(text)


def _no_utf8(where: str, error: UnicodeError) -> UserError:
    return UserError(f"{where} is no UTF-8 text ({error}); convert it, for example with iconv")


def _typed() -> Iterator[str]:
    """Lines until Ctrl-D."""
    print(INTRODUCTION, file=sys.stderr)
    while True:
        try:
            yield _checked(input(MARK), "the prompt")
        except EOFError:
            print(file=sys.stderr)
            return
        except (UnicodeDecodeError, UserError) as error:
            problem = error if isinstance(error, UserError) else _no_utf8("the prompt", error)
            print(f"error: {problem}", file=sys.stderr)
