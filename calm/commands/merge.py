"""`calm merge`: a model's folder from a checkpoint, whose weights may lie in shards."""

import argparse
from pathlib import Path

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm merge runs/calm/checkpoint-500 --output runs/calm-500

Writes safetensors, configuration, tokenizer and protocol: what `calm eval`, `generate` and
`serve` read, and --model_name_or_path. The whole model is held in memory once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write, new or empty"
    )


def run(args: argparse.Namespace) -> int:
    """Merge the checkpoint; 0."""
    from transformers.utils.logging import disable_progress_bar

    from calm.training.sharding.merging import merge_checkpoint

    disable_progress_bar()  # of one file being written
    model = merge_checkpoint(Path(args.checkpoint), Path(args.output))
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{args.output}: {type(model).__name__}, {size:,} weights")
    return 0
