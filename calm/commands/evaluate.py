"""`calm eval`: BrierLM of a model on a text, with its interval and protocol."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from calm.commands.model_flags import add_model_arguments, load_model, load_tokenizer_of
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks
from calm.errors import UserError
from calm.ranges import NOT_NEGATIVE, SEED, at_least, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm eval --model runs/demo/calm --data embedded:docstrings
  calm eval --model runs/calm-m --data wikitext-test.txt --block-size 8192 --json brier.json
  calm eval --model runs/baseline-s --data wikitext-test.txt --max-blocks 64

Compare numbers only if their protocols agree: the block size alone moves BrierLM by some 30 %.

--json writes: brier_lm (0 to 100), brier (brier1 to brier4, fractions), their 95 % intervals
brier_lm_interval and brier_intervals (bootstrap over blocks), standard_errors of brier (between
blocks), and protocol: all that is needed to compute the same numbers again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser)
    add_evaluation_text_arguments(parser)
    parser.add_argument(
        "--batch-size",
        type=number(int, at_least(1)),
        default=4,
        metavar="B",
        help="blocks in one forward pass; no effect on the result (default: 4)",
    )
    parser.add_argument(
        "--num-samples",
        type=number(int, at_least(1)),
        default=8,
        metavar="N",
        help="draws of each chunk (default: 8)",
    )
    parser.add_argument(
        "--brier-draws",
        type=number(int, at_least(2)),
        metavar="M",
        help="draws the score uses: 2 is the published estimator (default: all)",
    )
    parser.add_argument(
        "--noise-scale",
        type=number(float, NOT_NEGATIVE),
        default=1.0,
        metavar="S",
        help="factor on the head's noise; 0 scores the deterministic model (default: 1)",
    )
    parser.add_argument(
        "--skip-repeats",
        action="store_true",
        help="skip n-grams of one repeated token, such as rules and blank runs",
    )
    parser.add_argument(
        "--seed",
        type=number(int, SEED),
        default=0,
        metavar="S",
        help="of draws and bootstrap (default: 0)",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from tqdm import tqdm

    from calm.evaluation import evaluate
    from calm.memory import check_draws

    if args.json:
        _check_writable(Path(args.json))
    model = load_model(args)
    blocks, text = load_blocks(args, model, load_tokenizer_of(args, model))
    check_draws(model, "--num-samples", args.num_samples, _chunks(model, blocks))
    total = -(-len(blocks) // args.batch_size)
    evaluation = evaluate(
        model,
        blocks,
        num_samples=args.num_samples,
        brier_draws=args.brier_draws,
        noise_scale=args.noise_scale,
        skip_repeats=args.skip_repeats,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=partial(tqdm, total=total, desc="evaluating", disable=None),  # at a terminal
        describe={"model": args.model, "kind": type(model).__name__, **text},
    )
    print(evaluation.to_table())
    if args.json:
        Path(args.json).write_text(evaluation.to_json(), encoding="utf-8")
    return 0


def _chunks(model: Any, blocks: Any) -> int:
    """Chunks of a block."""
    return len(blocks[0]["input_ids"]) // getattr(model, "patch_size", 1)


def _check_writable(path: Path) -> None:
    """Raise before the evaluation rather than after it."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"--json {path} cannot be written; its folder must exist and be writable")
