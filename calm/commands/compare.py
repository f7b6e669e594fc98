"""`calm compare`: several trained models on one text, at the same positions."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from calm.commands.model_flags import (
    add_loading_arguments,
    load_model,
    load_tokenizer_of,
    model_folder,
    read_config,
)
from calm.commands.run_text import (
    check_comparable,
    choose_block_size,
    choose_text,
    patch_size_of,
    run_record,
)
from calm.commands.scoring_flags import add_scoring_arguments, check_writable, scoring_settings
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks
from calm.errors import UserError
from calm.pretrained import shown_name

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm compare calm-docstrings calm-docstrings-baseline           those of the package
  calm compare runs/demo/calm runs/demo/baseline
  calm compare runs/k2 runs/k4 runs/k8 --data wikitext-test.txt --plot compare.png
  calm compare runs/a runs/b --max-blocks 64 --json compare.json

K may differ, and so may start chunks: only n-grams count that start at the same places of the text
for all. Differences are paired: the same spans of text are resampled for both models. A model ties
with the first where the 95 % interval of its difference holds 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument(
        "runs", nargs="+", type=model_folder, metavar="RUN", help="folders of trained models"
    )
    add_loading_arguments(parser)
    add_evaluation_text_arguments(parser, or_else="the held-out text of their training")
    add_scoring_arguments(parser)
    parser.add_argument("--plot", metavar="PNG", help="also draw scores and differences")
    parser.add_argument("--json", metavar="OUT", help="also write the record to this file")


def run(args: argparse.Namespace) -> int:
    """Score every model, rank them, print the table."""
    from calm.experiments.leaderboard import rank

    check_writable(args.json, "--json")
    check_writable(args.plot, "--plot")
    if len(set(args.runs)) < max(2, len(args.runs)):
        got = " ".join(map(shown_name, args.runs))
        raise UserError(f"RUN: name at least two different folders, got {got}")
    configs = {run: read_config(Path(run), "RUN") for run in args.runs}
    check_comparable(args, configs)
    choose_block_size(args, configs)
    choose_text(args, args.runs)
    board = rank([_entry(args, run, configs[run]) for run in args.runs], seed=args.seed)
    print(board.to_table())
    if args.json:
        Path(args.json).write_text(board.to_json(), encoding="utf-8")
    if args.plot:
        from calm.experiments.leaderboard_plot import plot_leaderboard

        plot_leaderboard(board, Path(args.plot))
        print(f"{args.plot}: scores, and differences from the first")
    return 0


def _entry(args: argparse.Namespace, run: str, config: dict[str, Any]) -> Any:
    """The model in the folder `run`, scored."""
    from calm.configuration import model_kind
    from calm.data.tokenizer import tokenizer_hash
    from calm.evaluation import score_text
    from calm.experiments.leaderboard import Entry
    from calm.memory import check_draws
    from calm.progress_bar import progress_bar

    own = argparse.Namespace(**{**vars(args), "model": run})
    name = shown_name(run)
    model: Any = load_model(own, "RUN")
    tokenizer = load_tokenizer_of(own, model)
    blocks, text = load_blocks(own, model, tokenizer)
    size, kind = patch_size_of(config), model_kind(config)
    check_draws(model, "--num-samples", args.num_samples, args.block_size // size)
    scores = score_text(
        model,
        blocks,
        **scoring_settings(args),
        progress=partial(progress_bar, total=-(-len(blocks) // args.batch_size), desc=name),
        describe={"model": name, "kind": kind, "tokenizer_hash": tokenizer_hash(tokenizer), **text},
    )
    frozen = getattr(model, "ae_model", None)
    parameters = sum(weight.numel() for weight in model.parameters())
    parameters -= sum(weight.numel() for weight in frozen.parameters()) if frozen else 0
    return Entry(name, kind, size, parameters, _training_tokens(run), scores)


def _training_tokens(run: str) -> int | None:
    """Tokens read in training, from the records that a run leaves; None without them."""
    from calm.experiments.run_logs import tokens_per_step

    steps = run_record(run, "trainer_state.json").get("global_step")
    tokens = tokens_per_step(run_record(run))
    return steps * tokens if isinstance(steps, int) and tokens is not None else None
