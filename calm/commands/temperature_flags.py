"""`calm experiment temperature`: its flags, and running it."""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from calm.commands.model_flags import add_model_arguments, load_model, load_tokenizer_of
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks
from calm.errors import UserError
from calm.pretrained import shown_name
from calm.ranges import SEED, at_least, number

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    add_model_arguments(parser, default=os.path.join("runs", "demo", "calm"))
    add_evaluation_text_arguments(parser, default="embedded:docstrings")
    parser.add_argument(
        "--positions",
        type=number(int, at_least(2)),
        default=128,
        metavar="P",
        help="positions in the text (default: 128)",
    )
    parser.add_argument(
        "--repeats",
        type=number(int, at_least(1)),
        metavar="R",
        help="chunks drawn at each position (default: 6)",
    )
    parser.add_argument(
        "--max-draws",
        type=number(int, at_least(1)),
        metavar="D",
        help="cap of the exact method for a chunk (default: 2000)",
    )
    parser.add_argument("--quick", action="store_true", help="a few settings, to try it out")
    parser.add_argument(
        "--seed",
        type=number(int, SEED),
        default=0,
        metavar="S",
        help="of positions and draws (default: 0)",
    )
    parser.add_argument(
        "--output-dir",
        default=os.path.join("runs", "temperature"),
        metavar="DIR",
        help="for table, record and figure (default: runs/temperature)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write, print the table."""
    from calm.experiments.temperature import QUICK, run_study, write_study
    from calm.experiments.temperature_measures import StudyOptions, take_positions
    from calm.models.continuous import ContinuousTransformer
    from calm.progress_bar import progress_bar

    given = {"repeats": args.repeats, "max_draws": args.max_draws, "seed": args.seed}
    options = replace(
        QUICK if args.quick else StudyOptions(),
        **{name: value for name, value in given.items() if value is not None},
    )
    model = load_model(args)
    if not isinstance(model, ContinuousTransformer):
        raise UserError(f"{args.model} holds a token baseline; this study needs a CALM")
    blocks, _ = load_blocks(args, model, load_tokenizer_of(args, model))
    positions = take_positions(model, blocks, args.positions, args.seed)
    progress = partial(progress_bar, desc="settings")
    study = run_study(model, positions, options, progress)
    study.measured_on.update(model=shown_name(args.model), data=args.data)
    folder = Path(args.output_dir)
    print(write_study(study, folder))
    print(f"{folder}: temperature.md, temperature.json and temperature.png")
    return 0
