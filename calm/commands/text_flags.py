"""The flags that name a text, and the documents or blocks that they stand for."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.data.options import SCORED_BLOCK_SIZE
from calm.ranges import PERCENTAGE, at_least, number

if TYPE_CHECKING:
    from calm.data.options import CorpusOptions

__all__ = [
    "add_evaluation_text_arguments",
    "add_split_argument",
    "add_text_arguments",
    "add_trust_argument",
    "corpus_options",
    "held_out_percentage",
    "hide_bars_without_terminal",
    "load_blocks",
]

FILES = "text, .jsonl, .json (also .gz, .zst) or .parquet files (comma-separated, globs work)"
TEXT_UNITS = ("line", "paragraph", "file")
DEFAULT_SPLIT = 5.0  # percent of a text that training holds out


def add_text_arguments(
    parser: argparse.ArgumentParser,
    or_else: str,
    *,
    flag: str = "--data",
    metavar: str = "TEXT",
    is_required: bool = True,
    default: str | None = None,
    text_unit: str = "line",
    about_units: str = "",
) -> None:
    """The flags that say which text to read, and what one document of it is.

    Args:
        parser: of the command.
        or_else: continues the help text after the kinds of files.
        flag: that names the text.
        metavar: its value in the help text.
        is_required: whether the flag must be given.
        default: the text without the flag.
        text_unit: one document of a text file by default.
        about_units: continues the help text of ``--text-unit``.
    """
    parser.add_argument(
        flag, required=is_required, default=default, metavar=metavar, help=FILES + or_else
    )
    parser.add_argument(
        "--text-unit",
        choices=TEXT_UNITS,
        default=text_unit,
        help=f"one document of a text file{about_units} (default: {text_unit})",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about text that cannot be read: stop (default), or skip and count it",
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """The only flag that lets code run that comes with a tokenizer."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the tokenizer; only if you have read it",
    )


def add_split_argument(
    parser: argparse.ArgumentParser, about: str, default: float | None = None
) -> None:
    """The flag that says how much of the text training holds out; `about` is its help text."""
    parser.add_argument(
        "--validation-split-percentage",
        type=number(float, PERCENTAGE),
        metavar="P",
        default=default,
        help=about,
    )


def add_evaluation_text_arguments(
    parser: argparse.ArgumentParser, default: str | None = None, *, or_else: str | None = None
) -> None:
    """The flags that say which text a model is evaluated on, and how it is cut into blocks.

    Args:
        parser: of the command.
        default: the text without a flag; None makes the flag required.
        or_else: what the command takes without the flag, if it finds that by itself.
    """
    without = or_else or default
    add_text_arguments(
        parser,
        ", a folder of `calm prepare`, whose held-out documents are scored, or "
        "embedded:docstrings, embedded:packages, embedded:sources, embedded:topics"
        + ("" if without is None else f" (default: {without})"),
        is_required=without is None,
        default=default,
    )
    add_split_argument(
        parser,
        "score the P %% of documents that training with this setting holds out; 0 scores all "
        f"(default: {DEFAULT_SPLIT:g} for embedded corpora, 0 for files; a prepared text has its "
        "own)",
    )
    parser.add_argument(
        "--block-size",
        type=number(int, at_least(1)),
        metavar="T",
        help=f"tokens of a sequence (default: {SCORED_BLOCK_SIZE}, or the model's context)",
    )
    parser.add_argument(
        "--max-blocks",
        type=number(int, at_least(1)),
        metavar="N",
        help="use the first N blocks only",
    )


def corpus_options(data: str, **options: Any) -> "CorpusOptions":
    """`CorpusOptions` for ``--data``: files or a prepared text, else a corpus of that name."""
    from calm.data.files import names_files
    from calm.data.manifest import is_prepared
    from calm.data.options import CorpusOptions

    is_file = names_files(data) or is_prepared(data)
    source: dict[str, Any] = {"train_file" if is_file else "dataset_name": data}
    return CorpusOptions(**source, **options)


def hide_bars_without_terminal() -> None:
    """No progress bars of datasets in a log."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def held_out_percentage(args: argparse.Namespace) -> float:
    """The share of ``--data`` that is scored, in percent; 0 for all of it."""
    from calm.data.embedded import PREFIX
    from calm.data.manifest import is_prepared, read_description

    percentage: float | None = args.validation_split_percentage
    if percentage is not None:
        return percentage
    if is_prepared(args.data):
        return read_description(Path(args.data)).validation_split_percentage
    return DEFAULT_SPLIT if args.data.startswith(PREFIX) else 0.0


def load_blocks(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The text that the flags of `add_evaluation_text_arguments` name, as packed blocks.

    Returns: the blocks, and what a protocol says of the text.
    """
    from calm.evaluation.text import scored_blocks

    hide_bars_without_terminal()
    percentage = held_out_percentage(args)
    options = corpus_options(
        args.data,
        validation_split_percentage=percentage,
        text_unit=args.text_unit,
        on_error=args.on_error,
    )
    blocks, skipped = scored_blocks(
        options, model, tokenizer, block_size=args.block_size, max_blocks=args.max_blocks
    )
    about = {"data": args.data, "held_out_percentage": percentage, "skipped_documents": skipped}
    return blocks, about
