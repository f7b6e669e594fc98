"""From a text that the user names to blocks that a model is scored on."""

import argparse
import sys
from typing import Any

from calm.commands.prepare import corpus_options
from calm.errors import UserError

__all__ = ["add_text_arguments", "load_blocks"]

DEFAULT_BLOCK_SIZE = 2048
DEFAULT_SPLIT = 5.0  # percent of an embedded corpus that training holds out by default


def add_text_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The flags that say which text, and how it is cut; `default` is the text without a flag."""
    parser.add_argument(
        "--data",
        required=default is None,
        default=default,
        metavar="TEXT",
        help=".txt, .jsonl or .json files (comma-separated, globs work), or embedded:docstrings, "
        "embedded:topics" + ("" if default is None else f" (default: {default})"),
    )
    parser.add_argument(
        "--validation-split-percentage",
        type=float,
        metavar="P",
        help="score the P %% of documents that training with this setting holds out; 0 scores all "
        "(default: 5 for embedded corpora, 0 for files)",
    )
    parser.add_argument(
        "--text-unit",
        choices=("line", "paragraph", "file"),
        default="line",
        help="one document of a .txt file (default: line)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="T",
        help=f"tokens of a sequence (default: {DEFAULT_BLOCK_SIZE}, or the model's context)",
    )
    parser.add_argument("--max-blocks", type=int, metavar="N", help="use the first N blocks only")


def load_blocks(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """The text that the flags of `add_text_arguments` name, as packed blocks."""
    import datasets

    from calm.data.corpus import load_corpus
    from calm.data.embedded import PREFIX
    from calm.data.packing import pack_documents

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    is_embedded = args.data.startswith(PREFIX)
    percentage = args.validation_split_percentage
    if percentage is None:
        percentage = DEFAULT_SPLIT if is_embedded else 0.0
    corpus = load_corpus(
        corpus_options(
            args.data,
            validation_split_percentage=percentage,
            text_unit=args.text_unit,
        )
    )
    patch_size = getattr(model, "patch_size", 1)
    return pack_documents(
        corpus.validation if percentage else corpus.train,
        tokenizer,
        block_size=_block_size(args.block_size, model.config.max_position_embeddings * patch_size),
        patch_size=patch_size,
        start_token_id=getattr(model, "start_token_id", None),
        max_blocks=args.max_blocks,
    )


def _block_size(wanted: int | None, context: int) -> int:
    """The block size, within the model's context."""
    if wanted is None:
        return min(DEFAULT_BLOCK_SIZE, context)
    if wanted > context:
        raise UserError(f"--block-size {wanted} exceeds the model's context of {context} tokens")
    return wanted
