"""`calm bench`: what this machine's CPU makes of it, without a checkout."""

import argparse
import json
from pathlib import Path
from typing import Any

from calm.commands.model_flags import load_model, load_tokenizer_of, model_folder, say_default
from calm.commands.scoring_flags import check_writable
from calm.errors import UserError
from calm.pretrained import PRETRAINED, pretrained_path
from calm.ranges import at_least, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm bench                                      the models that come with the package
  calm bench --model runs/demo/calm --baseline runs/demo/baseline --threads 1

Tokens a second of one text, by what draws it, beside the baseline; and operations beside their
formulas, the reference backend. Nothing is timed before its text, or its numbers, are those of the
reference backend. Everything is run in turn, once in each round: medians, and the range that three
fifths of the rounds lie in. All of it takes seconds. The benchmarks of a checkout (`make bench`)
measure more, and against the published algorithms.
"""
PROMPT = "Returns the "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    for flag, name in zip(("--model", "--baseline"), PRETRAINED, strict=True):
        parser.add_argument(
            flag,
            metavar="DIR",
            type=model_folder,
            help=f"folder of a trained {'CALM' if flag == '--model' else 'token baseline'} "
            f"(default: {name}, which comes with the package)",
        )
    parser.add_argument(
        "--rounds",
        type=number(int, at_least(2)),
        default=7,
        metavar="R",
        help="how often each is run (default: 7)",
    )
    parser.add_argument(
        "--threads",
        type=number(int, at_least(1)),
        metavar="T",
        help="of torch (default: what torch chooses)",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    import torch

    from calm.data.encoding import Encoder
    from calm.experiments.speed import measure_speed
    from calm.models import BaselineTransformer, ContinuousTransformer

    check_writable(args.json, "--json")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = _load(args, "model", ContinuousTransformer)
    baseline, other = _load(args, "baseline", BaselineTransformer)
    prompt = Encoder(tokenizer).prompt(PROMPT)
    if Encoder(other).prompt(PROMPT) != prompt:
        raise UserError("--baseline must have the tokenizer of --model: speeds are of tokens")
    try:
        speed = measure_speed(model, baseline, prompt, rounds=args.rounds)
    except AssertionError as error:  # two backends differ, so that their times do not compare
        raise UserError(str(error)) from error
    print(speed.to_table())
    if args.json:
        Path(args.json).write_text(json.dumps(speed.record(), indent=2) + "\n", encoding="utf-8")
    return 0


def _load(args: argparse.Namespace, flag: str, kind: type) -> tuple[Any, Any]:
    """The model that `flag` names, of that kind, on the CPU, and its tokenizer."""
    folder = getattr(args, flag)
    if folder is None:
        name = PRETRAINED[flag == "baseline"]
        folder = str(pretrained_path(name))
        say_default(name, flag=f"--{flag}")
    own = argparse.Namespace(
        model=folder, device="cpu", dtype="float32", tokenizer=None, trust_remote_code=False
    )
    model = load_model(own, f"--{flag}")
    if not isinstance(model, kind):
        wanted = "the token baseline" if flag == "baseline" else "a CALM"
        raise UserError(f"--{flag} takes {wanted}; {folder} holds a {type(model).__name__}")
    return model, load_tokenizer_of(own, model)
