"""`calm eval`: BrierLM of a model on a text, with its interval and protocol."""

import argparse
from functools import partial
from pathlib import Path

from calm.commands.model_flags import add_model_arguments, load_model, load_tokenizer_of
from calm.commands.scoring_flags import add_scoring_arguments, check_writable, scoring_settings
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks

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
    add_scoring_arguments(parser)
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from tqdm import tqdm

    from calm.evaluation import evaluate
    from calm.memory import check_draws

    check_writable(args.json, "--json")
    model = load_model(args)
    blocks, text = load_blocks(args, model, load_tokenizer_of(args, model))
    chunks = len(blocks[0]["input_ids"]) // getattr(model, "patch_size", 1)
    check_draws(model, "--num-samples", args.num_samples, chunks)
    total = -(-len(blocks) // args.batch_size)
    evaluation = evaluate(
        model,
        blocks,
        **scoring_settings(args),
        progress=partial(tqdm, total=total, desc="evaluating", disable=None),  # at a terminal
        describe={"model": args.model, "kind": type(model).__name__, **text},
    )
    print(evaluation.to_table())
    if args.json:
        Path(args.json).write_text(evaluation.to_json(), encoding="utf-8")
    return 0
