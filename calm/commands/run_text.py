"""The text of trained models: what they were trained on says what scores them, without a flag."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm.data.options import SCORED_BLOCK_SIZE
from calm.errors import UserError
from calm.pretrained import shown_name

__all__ = [
    "check_comparable",
    "choose_block_size",
    "choose_text",
    "patch_size_of",
    "run_record",
    "training_text",
]


def choose_text(args: argparse.Namespace, runs: Sequence[str]) -> None:
    """Without ``--data``: the embedded corpus of the runs' training, and its held-out share.

    Files are not looked for: a protocol names them without their folders.
    """
    if args.data is not None:
        return
    texts = {run: training_text(run) for run in runs}
    first, *others = texts.items()
    different = next((text for text in others if text[1] != first[1]), None)
    if different:
        known = [f"{shown_name(run)}: {name or 'nothing known'}, {share} % held out"
                 for run, (name, share) in (first, different)]  # fmt: skip
        raise UserError(
            f"the runs were trained on different texts ({'; '.join(known)}): pass --data"
        )
    name, share = first[1]
    if not name.startswith("embedded:") or share is None:
        known_as = f"trained on {name}" if name else "without a protocol.json that names a text"
        raise UserError(f"{runs[0]} was {known_as}; pass the text to score on with --data")
    args.data = name
    if args.validation_split_percentage is None:
        args.validation_split_percentage = share
    asked = args.validation_split_percentage
    of_it = f"the {asked:g} % held out" if asked else "all of it"
    trained = "as in training" if asked == share else f"training held out {share:g} %"
    print(f"text: {name}, {of_it} ({trained})\n")


def training_text(run: str) -> tuple[str, float | None]:
    """What a run was trained on, empty if it does not say, and the percentage that it held out."""
    protocol = run_record(run)
    name = protocol.get("dataset") or ", ".join(protocol.get("train_files") or [])
    return name, protocol.get("validation_split_percentage")


def choose_block_size(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    """Without ``--block-size``: the least that a run was trained with, a multiple of every K."""
    from calm.data.blocks import check_block_size

    sizes = [patch_size_of(config) for config in configs.values()]
    if args.block_size is not None:
        for size in sizes:
            check_block_size(args.block_size, size)
        return
    trained = [run_record(run).get("block_size") for run in configs]
    contexts = [
        config.get("max_position_embeddings", SCORED_BLOCK_SIZE) * size
        for config, size in zip(configs.values(), sizes, strict=True)
    ]
    least = min(SCORED_BLOCK_SIZE, *contexts, *(size for size in trained if size))
    args.block_size = least - least % math.lcm(*sizes)


def check_comparable(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    """Raise before any model is scored if tokenizers differ, or dtypes where no flag sets one."""
    if args.tokenizer is None:
        hashes = {run: run_record(run).get("tokenizer_hash") for run in configs}
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


def patch_size_of(config: dict[str, Any]) -> int:
    """K; 1 for the baseline."""
    return int(config.get("patch_size") or 1)


def run_record(run: str, name: str = "protocol.json") -> dict[str, Any]:
    """A JSON file of a run; empty if it has none."""
    from calm.training.checkpoints.resume import read_record

    return read_record(Path(run), name)
