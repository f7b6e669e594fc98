"""`calm plot`: what training runs have logged, drawn side by side."""

import argparse
from pathlib import Path

from calm.commands.scoring_flags import check_writable
from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm plot runs/calm
  calm plot runs/calm runs/wider --x flops --output wider.png
  calm plot runs/calm runs/baseline --x seconds

Shows the loss with its terms, BrierLM with its 95 % interval, gradient norms and throughput. A run
that is still going is shown up to its last checkpoint.
"""
AXES = ("steps", "tokens", "flops", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of training")
    parser.add_argument(
        "--x", choices=AXES, default="steps", help="what runs are compared at (default: steps)"
    )
    parser.add_argument(
        "--output", default="runs.png", metavar="IMAGE", help="PNG, PDF or SVG (default: runs.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the figure, and say where it is."""
    from calm.experiments.run_logs import read_run
    from calm.experiments.run_plot import panels_of, plot_runs

    if Path(args.output).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output must end in .png, .pdf or .svg, got {args.output}")
    check_writable(args.output, "--output")
    if len(set(args.runs)) < len(args.runs):
        raise UserError(f"RUN: name each folder once, got {' '.join(args.runs)}")
    runs = [read_run(Path(folder)) for folder in args.runs]
    plot_runs(runs, args.x, Path(args.output))
    print(f"{args.output}: {', '.join(panels_of(runs))} of {', '.join(args.runs)}")
    return 0
