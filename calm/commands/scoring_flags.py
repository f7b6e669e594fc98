"""The flags that say how a model is scored, for all commands that score one."""

import argparse
import os
from pathlib import Path
from typing import Any

from calm.errors import UserError
from calm.ranges import NOT_NEGATIVE, SEED, at_least, number

__all__ = ["add_scoring_arguments", "check_writable", "scoring_settings"]


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `calm.evaluation.scores.score_text`."""
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
        "--noise-spread",
        type=number(float, NOT_NEGATIVE),
        default=1.0,
        metavar="S",
        help="factor on the noise after an energy head has normalised it: below 1 draws are less "
        "diverse (default: 1)",
    )
    parser.add_argument(
        "--method",
        choices=("direct", "readout"),
        default="direct",
        help="what draws: the head of a CALM (direct, default) or its readout (docs/readout.md)",
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


def scoring_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `score_text` that the flags name."""
    names = (
        "num_samples", "brier_draws", "noise_scale", "noise_spread", "method", "skip_repeats",
        "seed", "batch_size",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def check_writable(path: str | None, flag: str) -> None:
    """Raise if `path` cannot be written: before the work rather than after it."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UserError(f"{flag} {path} cannot be written; its folder must exist and be writable")
