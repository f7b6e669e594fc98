"""`calm demo`: autoencoder, CALM and token baseline from nothing, in minutes on two cores."""

import argparse
import logging
from pathlib import Path

from calm.commands.text_flags import add_text_arguments
from calm.ranges import POSITIVE, SEED, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm demo                                    the embedded text, about 8 minutes on two cores
  calm demo --text my.txt --minutes 20         your own text
  calm generate --model runs/demo/calm --prompt "Returns the " --temperature 0.33
  OMP_WAIT_POLICY=PASSIVE calm demo            the same where other programs share the cores
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_text_arguments(
        parser,
        " to learn from; default: docstrings of Python's standard library",
        flag="--text",
        metavar="FILES",
        is_required=False,
        text_unit="paragraph",
        about_units="; some are held out",
    )
    parser.add_argument(
        "--minutes",
        type=number(float, POSITIVE),
        default=8.0,
        metavar="M",
        help="time for all of it (default: 8)",
    )
    parser.add_argument(
        "--output-dir",
        default="runs/demo",
        metavar="DIR",
        help="written over if it exists (default: runs/demo)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, SEED),
        default=1,
        metavar="S",
        help="of weights, batches and draws (default: 1)",
    )
    parser.add_argument(
        "--recipe", default="demo", metavar="NAME", help="sizes and rates (default: demo)"
    )


def run(args: argparse.Namespace) -> int:
    """Train, score, sample, report."""
    from calm.experiments.demo import DemoOptions, run_demo
    from calm.experiments.demo_report import to_console

    _hide_progress_of_libraries()
    folder = Path(args.output_dir)
    options = DemoOptions(
        folder=folder,
        text=args.text,
        text_unit=args.text_unit,
        on_error=args.on_error,
        minutes=args.minutes,
        seed=args.seed,
        recipe=args.recipe,
    )
    print(to_console(run_demo(options)))
    print(f"\n{folder}: report.md, curves.png, results.json and the three models")
    return 0


def _hide_progress_of_libraries() -> None:
    """The demo shows its own bars and figures; warnings and errors still show."""
    import datasets
    import transformers

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
