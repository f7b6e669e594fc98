"""`calm prepare`: a tokenizer, and a text or a mixture as shards that training maps into memory."""

import argparse
from fractions import Fraction
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.commands.text_flags import (
    DEFAULT_SPLIT,
    add_split_argument,
    add_text_arguments,
    add_trust_argument,
    hide_bars_without_terminal,
)
from calm.errors import UserError
from calm.ranges import at_least, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from calm.data.manifest import Description
    from calm.data.parts import Source

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm prepare --data embedded:docstrings --tokenizer bytes --output runs/bytes
  calm prepare --data 'books/*.txt' --tokenizer bpe:4096 --output runs/books --workers 8
  calm prepare --source web='web/*.jsonl.zst' --source code='code/*.parquet' \\
      --mixture web=0.7,code=0.3 --tokenizer NAME --output runs/mixed
  calm train-ae --train_file runs/books --tokenizer_name runs/books ...

The folder holds shards of token ids, prepared.json, which describes them, and the tokenizer.
The same command again goes on after a kill: finished shards are kept.
"""
SINGLE = "data"  # name of the source that --data is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_text_arguments(
        parser,
        ", embedded:docstrings (or :packages, :topics), or a hub dataset",
        is_required=False,
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="instead of --data, once for each text of several; TEXT as for --data",
    )
    parser.add_argument(
        "--mixture",
        metavar="NAME=W,...",
        help="share of each source in an epoch, as in web=0.7,code=0.3; they sum to 1. An epoch "
        "ends when the source that is scarcest for its share has been read once. Default: all of "
        "every source",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="'bytes', 'bpe:<entries>' (trained on the text), a folder or a hub name",
    )
    add_trust_argument(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for shards and tokenizer"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace another prepared text in --output",
    )
    add_split_argument(
        parser,
        f"documents to hold out, in percent; must be that of training (default: {DEFAULT_SPLIT:g})",
        default=DEFAULT_SPLIT,
    )
    parser.add_argument(
        "--patch-size",
        type=number(int, at_least(1)),
        default=4,
        metavar="K",
        help="tokens of a chunk, for models with a start chunk (default: 4); others read any K",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder for what datasets downloads and prepares",
    )
    parser.add_argument(
        "--workers",
        type=number(int, at_least(1)),
        default=1,
        metavar="N",
        help="number of processes that read and tokenize (default: 1, with threads)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the text, or what is left of it; print its size."""
    from calm.data.manifest import read_description
    from calm.data.preparing import clear_folder, find_preparation
    from calm.training.checkpoints.lock import locked

    folder = Path(args.output)
    if not args.output or folder.is_file():
        raise UserError(f"--output takes a folder, got {args.output!r}")
    if args.cache_dir is not None and Path(args.cache_dir).is_file():
        raise UserError(f"--cache-dir takes a folder, got {args.cache_dir!r}")
    hide_bars_without_terminal()
    sources, weights = _sources(args)
    request = _request(args, sources, weights)
    with locked(folder):
        if args.overwrite:
            clear_folder(folder)
        progress = find_preparation(folder, request)
        if progress == "finished":
            description = read_description(folder)
            if args.on_error == "stop" and description.skipped:
                raise UserError(
                    f"--on-error stop: {description.skipped} entries were skipped when {folder} "
                    "was made; pass --on-error skip to keep it, or mend the text and --overwrite"
                )
            _report(folder, description)
            return 0
        tokenizer = _tokenizer(args, folder, sources, is_saved=progress == "begun")
        _report(folder, _prepare(args, folder, sources, weights, request, tokenizer))
    return 0


def _sources(args: argparse.Namespace) -> tuple[list["Source"], dict[str, Fraction] | None]:
    """The texts that the flags name, opened, and their weights."""
    from calm.data.mixture import parse_sources, parse_weights
    from calm.data.options import CorpusOptions
    from calm.data.parts import open_source

    if (args.data is None) == (not args.source):
        raise UserError("pass --data TEXT, or --source NAME=TEXT for each text of several")
    named = parse_sources(args.source) if args.source else {SINGLE: args.data}
    if args.mixture is not None and not args.source:
        raise UserError("--mixture gives shares to --source NAME=TEXT; --data is one text")
    weights = None if args.mixture is None else parse_weights(args.mixture, named)
    options = CorpusOptions(
        text_unit=args.text_unit,
        on_error=args.on_error,
        cache_dir=args.cache_dir,
        preprocessing_num_workers=args.workers,
    )
    return [open_source(name, text, options) for name, text in named.items()], weights


def _request(
    args: argparse.Namespace, sources: list["Source"], weights: dict[str, Fraction] | None
) -> dict[str, Any]:
    from calm.data.preparing import request_of

    return request_of(
        sources,
        args.tokenizer,
        weights=weights and {name: str(weight) for name, weight in weights.items()},
        percentage=args.validation_split_percentage,
        patch_size=args.patch_size,
        text_unit=args.text_unit,
    )


def _tokenizer(
    args: argparse.Namespace, folder: Path, sources: list["Source"], *, is_saved: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer that the flags name, or the one with which an unfinished run began."""
    from calm.data.preparing import saved_tokenizer
    from calm.data.tokenizer import load_tokenizer

    return load_tokenizer(
        str(saved_tokenizer(folder)) if is_saved else args.tokenizer,
        argument="tokenizer",
        texts=_texts(args, sources),
        trust_remote_code=args.trust_remote_code,
        cache_dir=args.cache_dir,
    )


def _texts(args: argparse.Namespace, sources: list["Source"]) -> "Iterator[str]":
    """The documents that a tokenizer is trained on: of the sources in turn, none held out."""
    from calm.data.corpus import is_held_out
    from calm.data.options import TOKENIZER_DOCUMENTS
    from calm.data.parts import read_source

    share = args.validation_split_percentage
    turns = zip_longest(*(read_source(source, args.text_unit) for source in sources))
    texts = (text for turn in turns for text in turn if text is not None)
    kept = (text for text in texts if not (share and is_held_out(text, share)))
    return islice(kept, TOKENIZER_DOCUMENTS)


def _prepare(
    args: argparse.Namespace,
    folder: Path,
    sources: list["Source"],
    weights: dict[str, Fraction] | None,
    request: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> "Description":
    from calm.data.encoding import vocabulary_size
    from calm.data.part_writer import Job
    from calm.data.parts import shard_size
    from calm.data.preparing import write_shards
    from calm.data.shards import token_dtype

    job = Job(
        folder=folder,
        tokenizer=tokenizer,
        dtype=token_dtype(vocabulary_size(tokenizer)),
        patch_size=args.patch_size,
        percentage=args.validation_split_percentage,
        shard_size=shard_size(sources),
        text_unit=args.text_unit,
        on_error=args.on_error,
        tables={source.name: source.tables for source in sources if source.tables is not None},
    )
    return write_shards(job, sources, request, weights=weights, workers=args.workers)


def _report(folder: Path, description: "Description") -> None:
    print(f"tokenizer   {folder}  ({description.vocab_size:,} entries)")
    for title, split in (("training", "train"), ("held out", "validation")):
        shards = description.of_split(split)
        documents, characters, tokens = (
            sum(getattr(shard, name) for shard in shards)
            for name in ("documents", "characters", "tokens")
        )
        if shards:
            print(
                f"{title:12}{documents:,} documents, {characters:,} characters, {tokens:,} tokens "
                f"({characters / max(1, tokens):.2f} characters a token)"
            )
    for source in description.sources:
        if source.skipped:
            print(
                f"skipped     {source.skipped:,} entries of {source.name}, the first: "
                f"{source.first_skipped}"
            )
