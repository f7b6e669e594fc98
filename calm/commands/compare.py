"""`calm compare`: several trained models on one text, at the same positions."""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from calm.commands.model_flags import (
    add_loading_arguments,
    load_model,
    load_tokenizer_of,
    model_kind,
    read_config,
)
from calm.commands.scoring_flags import add_scoring_arguments, check_writable, scoring_settings
from calm.commands.text_flags import add_evaluation_text_arguments, load_blocks
from calm.data.options import SCORED_BLOCK_SIZE
from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm compare runs/demo/calm runs/demo/baseline
  calm compare runs/k2 runs/k4 runs/k8 --data wikitext-test.txt --plot compare.png
  calm compare runs/a runs/b --max-blocks 64 --json compare.json

K may differ, and so may start chunks: only n-grams count that start at the same places of the text
for all. Differences are paired: the same spans of text are resampled for both models. A model ties
with the first where the 95 % interval of its difference holds 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of trained models")
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
        raise UserError(f"RUN: name at least two different folders, got {' '.join(args.runs)}")
    configs = {run: read_config(Path(run), "RUN") for run in args.runs}
    _check_comparable(args, configs)
    _choose_block_size(args, configs)
    _choose_text(args)
    board = rank([_entry(args, run, configs[run]) for run in args.runs], seed=args.seed)
    print(board.to_table())
    if args.json:
        Path(args.json).write_text(board.to_json(), encoding="utf-8")
    if args.plot:
        from calm.experiments.leaderboard_plot import plot_leaderboard

        plot_leaderboard(board, Path(args.plot))
        print(f"{args.plot}: scores, and differences from the first")
    return 0


def _choose_text(args: argparse.Namespace) -> None:
    """Without ``--data``: the embedded corpus of the runs' training, and its held-out share.

    Files are not looked for: a protocol names them without their folders.
    """
    if args.data is not None:
        return
    texts = {}
    for run in args.runs:
        protocol = _record(run)
        name = protocol.get("dataset") or ", ".join(protocol.get("train_files") or [])
        texts[run] = (name, protocol.get("validation_split_percentage"))
    first, *others = texts.items()
    different = next((text for text in others if text[1] != first[1]), None)
    if different:
        known = [f"{run}: {name or 'nothing known'}, {share} % held out"
                 for run, (name, share) in (first, different)]  # fmt: skip
        raise UserError(
            f"the runs were trained on different texts ({'; '.join(known)}): pass --data"
        )
    name, share = first[1]
    if not name.startswith("embedded:") or share is None:
        known_as = f"trained on {name}" if name else "without a protocol.json that names a text"
        raise UserError(f"{args.runs[0]} was {known_as}; pass the text to compare on with --data")
    args.data = name
    if args.validation_split_percentage is None:
        args.validation_split_percentage = share
    asked = args.validation_split_percentage
    of_it = f"the {asked:g} % held out" if asked else "all of it"
    trained = "as in training" if asked == share else f"training held out {share:g} %"
    print(f"text: {name}, {of_it} ({trained})\n")


def _choose_block_size(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    """Without ``--block-size``: the least that a run was trained with, a multiple of every K."""
    from calm.data.packing import check_block_size

    sizes = [_patch_size(config) for config in configs.values()]
    if args.block_size is not None:
        for size in sizes:
            check_block_size(args.block_size, size)
        return
    trained = [_record(run).get("block_size") for run in args.runs]
    contexts = [
        config.get("max_position_embeddings", SCORED_BLOCK_SIZE) * size
        for config, size in zip(configs.values(), sizes, strict=True)
    ]
    least = min(SCORED_BLOCK_SIZE, *contexts, *(size for size in trained if size))
    args.block_size = least - least % math.lcm(*sizes)


def _check_comparable(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    """Raise before any model is scored if tokenizers differ, or dtypes where no flag sets one."""
    if args.tokenizer is None:
        hashes = {run: _record(run).get("tokenizer_hash") for run in args.runs}
        _check_equal(hashes, "tokenizer_hash", "an n-gram of one is not an n-gram of the other")
    if args.dtype == "auto":
        dtypes = {
            run: config.get("dtype", config.get("torch_dtype")) for run, config in configs.items()
        }
        _check_equal(dtypes, "dtype", "choose one for both with --dtype")


def _check_equal(values: dict[str, Any], name: str, advice: str) -> None:
    """Raise if two runs have different values; None is not known."""
    (first, expected), *others = [item for item in values.items() if item[1]] or [("", None)]
    for run, value in others:
        if value != expected:
            raise UserError(
                f"{first} and {run} cannot be compared: {name} is {expected} and {value}; {advice}"
            )


def _entry(args: argparse.Namespace, run: str, config: dict[str, Any]) -> Any:
    """The model in the folder `run`, scored."""
    from tqdm import tqdm

    from calm.data.tokenizer import tokenizer_hash
    from calm.evaluation import score_text
    from calm.experiments.leaderboard import Entry
    from calm.memory import check_draws

    own = argparse.Namespace(**{**vars(args), "model": run})
    model: Any = load_model(own, "RUN")
    tokenizer = load_tokenizer_of(own, model)
    blocks, text = load_blocks(own, model, tokenizer)
    size, kind = _patch_size(config), model_kind(config)
    check_draws(model, "--num-samples", args.num_samples, args.block_size // size)
    scores = score_text(
        model,
        blocks,
        **scoring_settings(args),
        progress=partial(
            tqdm, total=-(-len(blocks) // args.batch_size), desc=run, disable=None
        ),  # at a terminal
        describe={"model": run, "kind": kind, "tokenizer_hash": tokenizer_hash(tokenizer), **text},
    )
    frozen = getattr(model, "ae_model", None)
    parameters = sum(weight.numel() for weight in model.parameters())
    parameters -= sum(weight.numel() for weight in frozen.parameters()) if frozen else 0
    return Entry(run, kind, size, parameters, _training_tokens(run), scores)


def _patch_size(config: dict[str, Any]) -> int:
    """K; 1 for the baseline."""
    return int(config.get("patch_size") or 1)


def _training_tokens(run: str) -> int | None:
    """Tokens read in training, from the records that a run leaves; None without them."""
    protocol, state = _record(run), _record(run, "trainer_state.json")
    training = protocol.get("training", {})
    factors = [
        state.get("global_step"),
        protocol.get("block_size"),
        training.get("per_device_train_batch_size"),
        training.get("gradient_accumulation_steps"),
        training.get("world_size"),
    ]
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None


def _record(run: str, name: str = "protocol.json") -> dict[str, Any]:
    """A JSON file of a run; empty if it has none."""
    from calm.training.resume import read_record

    return read_record(Path(run), name)
