"""`calm experiment`: studies that train a grid of models, and two of trained models."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from calm.commands import gap_flags, temperature_flags
from calm.commands.text_flags import hide_bars_without_terminal
from calm.errors import UserError
from calm.ranges import SEED, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm experiment loss --scale tiny
  calm experiment loss --scale desk --test-file wikitext-test.jsonl
  calm experiment loss --scale paper --train-file runs/pile --tokenizer runs/pile --list
  calm experiment temperature --model runs/demo/calm
  calm experiment gap --model runs/demo/calm --baseline runs/demo/baseline

An experiment trains its cells one after the other, measures each, and writes results.json,
report.md and report.png. Interrupted, it goes on with the first cell that is not finished.
"""
# Of trained models: flags and work, and what the help text says.
OF_TRAINED = {
    "temperature": (
        temperature_flags,
        "accuracy, diversity and cost of every method that lowers the temperature",
    ),
    "gap": (gap_flags, "where BrierLM is lost: in trunk, head, latent or dispersion of draws"),
}
NAMES = {
    "autoencoder": "regularisation, KL weight and latent size",
    "heads": "energy, diffusion and flow heads at equal training FLOPs",
    "start": "zero or scaled start of the head's last layer",
    "input": "whether the backbone reads tokens, latents or both",
    "scaling": "sizes, chunk sizes and budgets against the token baseline",
    "domains": "the same models on prose, documentation and code",
    "metric": "BrierLM against the models' own losses",
    "loss": "draws, targets and exponent of the energy loss",
    "recipe": "options that make a CALM better for the same training FLOPs",
    "latent": "options that change the latent of the autoencoder",
}
SCALES = ("tiny", "demo", "desk", "small", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommands, one for each experiment."""
    studies = parser.add_subparsers(dest="study", metavar="NAME", required=True)
    for name, (flags, about) in OF_TRAINED.items():
        flags.add_arguments(_child(studies, name, about))
    for name, about in NAMES.items():
        _add_grid_arguments(_child(studies, name, about))


def _child(studies: Any, name: str, about: str) -> argparse.ArgumentParser:
    child: argparse.ArgumentParser = studies.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False
    )
    return child


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scale", choices=SCALES, default="tiny", help="sizes and budgets (default: tiny)"
    )
    parser.add_argument(
        "--train-file", metavar="FILES", help="text to learn from (default: the scale's)"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="folder or hub name (default: the scale's)"
    )
    parser.add_argument("--test-file", metavar="FILES", help="further text to score on, all of it")
    parser.add_argument(
        "--seeds",
        type=number(int, SEED),
        nargs="+",
        metavar="S",
        help="a repetition of every cell for each (default: the scale's); more can be added later",
    )
    parser.add_argument(
        "--output-dir",
        default=os.path.join("runs", "experiments"),
        metavar="DIR",
        help="gets a folder for each scale, in it models and experiments "
        "(default: runs/experiments)",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print every training command and stop: to train on a cluster, into the same folders",
    )


def run(args: argparse.Namespace) -> int:
    """Run the experiment, print its table."""
    if args.study in OF_TRAINED:
        return OF_TRAINED[args.study][0].run(args)
    from transformers.utils.logging import disable_progress_bar

    from calm.experiments.experiment_report import write_index, write_report
    from calm.experiments.measures import Texts
    from calm.experiments.runner import all_cells, run_experiment, training_commands
    from calm.experiments.studies import EXPERIMENTS

    experiment, scale = EXPERIMENTS[args.study], _scale(args)
    root = Path(args.output_dir) / scale.name
    if args.list:
        print("\n".join(training_commands(all_cells(experiment, scale), root)))
        return 0
    hide_bars_without_terminal()
    disable_progress_bar()  # of weights being written
    texts = Texts(scale.autoencoder().flags, args.test_file, experiment.texts)
    record = run_experiment(experiment, scale, texts, root, progress=_bar)
    print(write_report(experiment, scale, record, root / experiment.name))
    write_index(list(EXPERIMENTS.values()), scale, root)
    print(f"{root / experiment.name}: results.json, report.md and report.png")
    return 0


def _scale(args: argparse.Namespace) -> Any:
    """The scale, with the text and tokenizer that flags name."""
    from calm.experiments.scales import SCALES

    scale: Any = SCALES[args.scale]
    if args.seeds:
        scale = replace(scale, seeds=tuple(args.seeds))
    flags: dict[str, str] = {}
    if args.train_file:
        flags |= {"dataset_name": "", "train_file": args.train_file}
    if args.tokenizer:
        flags["tokenizer_name"] = args.tokenizer
    if scale.needs_text and not (args.train_file and args.tokenizer):
        raise UserError(f"--scale {scale.name} needs --train-file and --tokenizer")
    return scale.with_flags(**flags)


def _bar(cells: Any) -> Any:
    """A bar over cells, with the name of the one in work."""
    from calm.progress_bar import progress_bar

    with progress_bar(cells, unit="cell") as bar:
        for cell in bar:
            bar.set_postfix_str(cell.name)
            yield cell
