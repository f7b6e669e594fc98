"""`calm prepare`: train or load a tokenizer, save it, and tokenize a corpus into the cache."""

import argparse
from pathlib import Path
from typing import Any

from calm.commands.text_flags import (
    DEFAULT_SPLIT,
    add_split_argument,
    add_text_arguments,
    add_trust_argument,
    corpus_options,
    hide_bars_without_terminal,
)
from calm.errors import UserError
from calm.ranges import at_least, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm prepare --data embedded:docstrings --tokenizer bytes --output runs/bytes
  calm prepare --data 'books/*.txt' --tokenizer bpe:4096 --output runs/bpe4096
  calm train-ae --tokenizer_name runs/bpe4096 --train_file 'books/*.txt' ...

Training tokenizes what is not in the cache. Prepare the corpus first to start several runs at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_text_arguments(parser, ", embedded:docstrings (or :packages, :topics), or a hub dataset")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME",
        help="'bytes', 'bpe:<entries>' (trained on the text), a folder or a hub name",
    )
    add_trust_argument(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to save the tokenizer in"
    )
    add_split_argument(
        parser,
        f"documents to hold out, in percent; must be that of training (default: {DEFAULT_SPLIT:g})",
        default=DEFAULT_SPLIT,
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder for the tokenized corpus",
    )
    parser.add_argument(
        "--workers",
        type=number(int, at_least(1)),
        metavar="N",
        help="number of processes that tokenize (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Save the tokenizer, fill the cache, print the size of the corpus."""
    from pyarrow import compute

    from calm.data.corpus import load_corpus
    from calm.data.encoding import vocabulary_size
    from calm.data.reading import TEXT_KEY
    from calm.data.tokenization import CHARACTERS, TOKENS, tokenize_documents
    from calm.data.tokenizer import load_tokenizer

    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file; pass a folder")
    hide_bars_without_terminal()
    corpus: Any = load_corpus(
        corpus_options(
            args.data,
            validation_split_percentage=args.validation_split_percentage,
            text_unit=args.text_unit,
            on_error=args.on_error,
            cache_dir=args.cache_dir,
            preprocessing_num_workers=args.workers,
        )
    )
    if corpus.train is None:
        raise UserError(f"--data {args.data} has no training split; pass files, or another dataset")
    texts = (row[TEXT_KEY] for row in corpus.train)
    tokenizer = load_tokenizer(
        args.tokenizer,
        argument="tokenizer",
        texts=texts,
        trust_remote_code=args.trust_remote_code,
        cache_dir=args.cache_dir,
    )
    tokenizer.save_pretrained(args.output)
    print(f"tokenizer   {args.output}  ({vocabulary_size(tokenizer):,} entries)")
    for name, documents in (("training", corpus.train), ("held out", corpus.validation)):
        if documents is None:
            continue
        tokenized = tokenize_documents(documents, tokenizer, num_proc=args.workers)
        columns = tokenized.with_format("arrow")[:]
        lengths = compute.list_value_length(columns[TOKENS])
        tokens, characters = (compute.sum(c).as_py() or 0 for c in (lengths, columns[CHARACTERS]))
        print(
            f"{name:12}{len(documents):,} documents, {characters:,} characters, {tokens:,} tokens "
            f"({characters / max(1, tokens):.2f} characters a token)"
        )
    return 0
