"""`calm eval`: BrierLM of a model on a text, with its interval and protocol."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from calm.commands.loading import add_model_arguments, load_model, load_tokenizer_of
from calm.commands.prepare import corpus_options
from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

DEFAULT_BLOCK_SIZE = 2048
DEFAULT_SPLIT = 5.0  # percent of an embedded corpus that training holds out by default

EXAMPLES = """\
  calm eval --model runs/demo/calm --data embedded:docstrings
  calm eval --model runs/calm-m --data wikitext-test.txt --block-size 8192 --json brier.json
  calm eval --model runs/baseline-s --data wikitext-test.txt --max-blocks 64

Compare numbers only if their protocols agree: the block size alone moves BrierLM by some 30 %.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help=".txt, .jsonl or .json files (comma-separated, globs work), or embedded:docstrings, "
        "embedded:topics",
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
    parser.add_argument("--max-blocks", type=int, metavar="N", help="score the first N blocks only")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="B",
        help="blocks a forward; no effect on the result (default: 4)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=8, metavar="N", help="draws a chunk (default: 8)"
    )
    parser.add_argument(
        "--brier-draws",
        type=int,
        metavar="M",
        help="draws the score uses: 2 is the published estimator (default: all)",
    )
    parser.add_argument(
        "--noise-scale",
        type=float,
        default=1.0,
        metavar="S",
        help="factor on the head's noise; 0 scores the deterministic model (default: 1)",
    )
    parser.add_argument(
        "--skip-repeats",
        action="store_true",
        help="leave out n-grams of one repeated token, such as rules and blank runs",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of draws and bootstrap (default: 0)"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from tqdm import tqdm

    from calm.evaluation import evaluate

    if args.json:
        _check_writable(Path(args.json))
    model = load_model(args)
    blocks = _blocks(args, model)
    total = -(-len(blocks) // args.batch_size)
    evaluation = evaluate(
        model,
        (blocks[index] for index in range(len(blocks))),
        num_samples=args.num_samples,
        brier_draws=args.brier_draws,
        noise_scale=args.noise_scale,
        skip_repeats=args.skip_repeats,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=lambda batches: tqdm(
            batches, total=total, desc="evaluating", disable=not sys.stderr.isatty()
        ),
        describe={"model": args.model, "kind": type(model).__name__, "data": args.data},
    )
    print(evaluation.to_table())
    if args.json:
        Path(args.json).write_text(evaluation.to_json(), encoding="utf-8")
    return 0


def _blocks(args: argparse.Namespace, model: Any) -> Any:
    """The text as packed blocks."""
    from calm.data.corpus import load_corpus
    from calm.data.embedded import PREFIX
    from calm.data.packing import pack_documents

    tokenizer = load_tokenizer_of(args, model)
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
        max_blocks=args.max_blocks,
    )


def _block_size(wanted: int | None, context: int) -> int:
    """The block size, within the model's context."""
    if wanted is None:
        return min(DEFAULT_BLOCK_SIZE, context)
    if wanted > context:
        raise UserError(f"--block-size {wanted} exceeds the model's context of {context} tokens")
    return wanted


def _check_writable(path: Path) -> None:
    """Complain before the work, not after it."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"--json {path} cannot be written; its folder must exist and be writable")
