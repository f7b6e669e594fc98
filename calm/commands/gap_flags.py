"""`calm experiment gap`: its flags, and running it."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from calm.commands.model_flags import (
    add_model_arguments,
    load_model,
    load_tokenizer_of,
    model_folder,
    read_config,
)
from calm.commands.run_text import (
    check_comparable,
    choose_block_size,
    choose_text,
    run_record,
    training_text,
)
from calm.commands.text_flags import (
    DEFAULT_SPLIT,
    add_evaluation_text_arguments,
    corpus_options,
    held_out_percentage,
    load_blocks,
)
from calm.errors import UserError
from calm.ranges import NOT_NEGATIVE, SEED, at_least, number

__all__ = ["add_arguments", "run"]

BLOCKS, QUICK_BLOCKS = 240, 60  # that are scored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    add_model_arguments(parser, default=os.path.join("runs", "demo", "calm"))
    parser.add_argument(
        "--baseline",
        type=model_folder,
        metavar="DIR",
        help="folder of a token baseline: shows the backbone's loss",
    )
    add_evaluation_text_arguments(parser, or_else="the held-out text of the model's training")
    parser.add_argument(
        "--train-data",
        metavar="TEXT",
        help="text that readouts learn from, without what is held out (default: what the model was "
        "trained on if it is embedded, else --data)",
    )
    parser.add_argument(
        "--train-chunks",
        type=number(int, at_least(1)),
        metavar="C",
        help="chunks of it that a readout learns from (default: 200000)",
    )
    parser.add_argument(
        "--steps",
        type=number(int, at_least(1)),
        metavar="S",
        help="training steps of a readout (default: 800)",
    )
    parser.add_argument(
        "--num-samples",
        type=number(int, at_least(2)),
        metavar="N",
        help="draws of each chunk (default: 8)",
    )
    parser.add_argument(
        "--spreads",
        type=number(float, NOT_NEGATIVE),
        nargs="+",
        metavar="S",
        help="values of noise_spread beside 1 (default: 0.5 to 1.1)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller text and a few steps, to try it out"
    )
    parser.add_argument(
        "--seed",
        type=number(int, SEED),
        default=0,
        metavar="S",
        help="of readouts, draws and intervals (default: 0)",
    )
    parser.add_argument(
        "--output-dir",
        default=os.path.join("runs", "gap"),
        metavar="DIR",
        help="for scores, record, report and figure (default: runs/gap); interrupted, the command "
        "goes on there",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write, print the report."""
    from calm.experiments.gap import Baseline, configuration_of, measure_gap, write_gap
    from calm.experiments.gap_store import GapStore
    from calm.models import BaselineTransformer, ContinuousTransformer
    from calm.progress_bar import progress_bar
    from calm.training.checkpoints.lock import locked

    configs = {args.model: read_config(Path(args.model))}
    if args.baseline:
        configs[args.baseline] = read_config(Path(args.baseline), "--baseline")
    check_comparable(args, configs)
    choose_block_size(args, configs)
    choose_text(args, list(configs))
    args.max_blocks = args.max_blocks or (QUICK_BLOCKS if args.quick else BLOCKS)
    model = load_model(args)
    if not isinstance(model, ContinuousTransformer):
        raise UserError(f"{args.model} holds a token baseline; this study needs a CALM")
    tokenizer = load_tokenizer_of(args, model)
    blocks, text = load_blocks(args, model, tokenizer)
    training, learned = _training_blocks(args, model, tokenizer)
    baseline = None
    if args.baseline:
        own = argparse.Namespace(**{**vars(args), "model": args.baseline})
        other = load_model(own, "--baseline")
        if not isinstance(other, BaselineTransformer):
            raise UserError(f"--baseline {args.baseline} holds a CALM; pass a token baseline")
        baseline = Baseline(other, load_blocks(own, other, tokenizer)[0])
    options = _options(args)
    text |= {
        "data": _without_folders(args.data),
        "held_out": held_out_percentage(args),
        "train_data": _without_folders(learned),
        "tokenizer_hash": run_record(args.model).get("tokenizer_hash"),
    }
    layout = {"block_size": args.block_size, "max_blocks": args.max_blocks}
    hashes = {"data_hash": blocks.data_hash(), "train_hash": training.data_hash()}
    folder = Path(args.output_dir)
    with locked(folder), progress_bar(desc="gap", unit=" parts") as bar:

        def announce(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        found = configuration_of(model, options, {**text, **layout, **hashes})
        gap = measure_gap(
            model,
            blocks,
            training,
            options,
            GapStore(folder, found, announce),
            tokenizer=tokenizer,
            measured_on={"model": Path(args.model).name, **text},
            baseline=baseline,
        )
    print(write_gap(gap, folder))
    print(f"{folder}: results.json, report.md and report.png")
    return 0


def _options(args: argparse.Namespace) -> Any:
    """`GapOptions` with what the flags change."""
    from calm.experiments.gap_measures import QUICK, GapOptions

    given = {
        "num_samples": args.num_samples, "steps": args.steps, "chunks": args.train_chunks,
        "spreads": tuple(args.spreads) if args.spreads else None, "seed": args.seed,
    }  # fmt: skip
    return replace(
        QUICK if args.quick else GapOptions(),
        **{name: value for name, value in given.items() if value is not None},
    )


def _training_blocks(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, str]:
    """What readouts learn from, as blocks, and its name. No document of it is scored.

    Raises:
        UserError: all of the text that is scored, or a file of it, would be learned from.
    """
    from calm.data.corpus import load_corpus
    from calm.data.embedded import PREFIX
    from calm.data.manifest import is_prepared
    from calm.data.packing import pack_documents

    trained_on, share = training_text(args.model)
    scored = held_out_percentage(args)
    name = args.train_data or (trained_on if trained_on.startswith(PREFIX) else args.data)
    # What a smaller share holds out, a larger one does as well.
    held_out = max(scored, DEFAULT_SPLIT if share is None else share)
    layout = {
        "block_size": args.block_size,
        "patch_size": model.patch_size,
        "start_token_id": model.start_token_id,
    }
    if is_prepared(name):
        least = 0.0 if name == args.data else held_out
        return _prepared_training(name, least).blocks_for(tokenizer, "train", **layout), name
    if not scored and (shared := _sources(name, "--train-data") & _sources(args.data, "--data")):
        raise UserError(
            f"readouts would learn from the text that is scored, {min(shared)}: hold a part of it "
            "out with --validation-split-percentage, or pass another text with --train-data"
        )
    options = corpus_options(
        name,
        validation_split_percentage=held_out,
        text_unit=args.text_unit,
        on_error=args.on_error,
    )
    return pack_documents(load_corpus(options).train, tokenizer, **layout), name


def _prepared_training(folder: str, held_out: float) -> Any:
    """A prepared text, whose training documents lack at least `held_out` percent."""
    from calm.data.prepared import PreparedText

    text = PreparedText(folder)
    made = text.description.validation_split_percentage
    if made < held_out:
        raise UserError(
            f"readouts would learn from text that is held out: {folder} was prepared with "
            f"{made:g} % held out; prepare it with --validation-split-percentage {held_out:g}"
        )
    return text


def _sources(data: str, flag: str) -> set[str]:
    """The files of a text, without links and dots in their paths; a dataset is its name."""
    from calm.data.files import expand_files, names_files

    if Path(data).is_dir():
        return {str(path.resolve()) for path in Path(data).rglob("*") if path.is_file()}
    if names_files(data):
        return {str(Path(file).resolve()) for file in expand_files(data, flag)}
    return {data}


def _without_folders(data: str) -> str:
    """The name of a text, for the record."""
    return ", ".join(Path(part).name for part in data.split(","))
