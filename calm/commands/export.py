"""`calm export`: a trained model in half precision, with its scores in its card."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from calm.commands import evaluate
from calm.commands.model_flags import add_model_arguments, load_model, load_tokenizer_of
from calm.commands.run_text import choose_text, run_record
from calm.commands.text_flags import add_evaluation_text_arguments
from calm.errors import UserError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm export --model runs/demo/calm --output shared/my-calm
  calm export --model runs/mine --output shared/mine --store bfloat16 --license mit

Writes what from_pretrained, the hub and all commands of calm read: weights in half precision
(loaded in the dtype that they were trained in), configuration, tokenizer, protocol.json of the
training, evaluation-METHOD.json as `calm eval --json` writes them, README.md, a card with these
scores, and manifest.json, which `calm verify` checks. Scores are of the weights as they are stored.
"""
TEXT_FLAGS = (
    "data", "text_unit", "on_error", "validation_split_percentage", "block_size", "max_blocks"
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    add_model_arguments(parser, is_required=True)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new folder; its name is that of the model in its card",
    )
    parser.add_argument(
        "--store",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="dtype of the weights in the file (default: float16)",
    )
    parser.add_argument(
        "--license", metavar="NAME", help="of the weights, for the card, as the hub names it"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier export has written there"
    )
    add_evaluation_text_arguments(parser, or_else="the held-out text of the model's training")


def run(args: argparse.Namespace) -> int:
    """Save, score, write the card."""
    from transformers.utils.logging import disable_progress_bar

    from calm.training.model_card import TrainedModel

    disable_progress_bar()  # of a file being written
    folder = Path(args.output)
    command = _command(args, folder.name)
    _check_output(folder, args.overwrite)
    model: Any = load_model(args)
    tokenizer = load_tokenizer_of(args, model)
    choose_text(args, [args.model])
    protocol, steps = _records(args.model)
    made = _beside(folder, "partial")  # an earlier export stays until this one is whole
    made.mkdir(parents=True)
    try:
        trained = TrainedModel(folder.name, model, protocol, steps)
        _write(made, trained, tokenizer, command, args)
        _replace(folder, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes")
    return 0


def _write(
    made: Path, trained: Any, tokenizer: Any, command: str, args: argparse.Namespace
) -> None:
    """Weights, tokenizer, records and card, and last the manifest."""
    import torch

    from calm.integrity import write_atomically, write_manifest
    from calm.models.saving import save_in
    from calm.training.export_card import export_card
    from calm.training.model_card import CARD

    save_in(trained.model, made, getattr(torch, args.store))
    tokenizer.save_pretrained(made)
    write_atomically(made / "protocol.json", _json(trained.protocol))
    evaluations = {}
    for method in _methods(trained.model):
        record = evaluate.score(_evaluation_flags(args, made, method)).record()
        record["protocol"]["model"] = trained.name  # no path of this machine
        evaluations[method] = record
        write_atomically(made / f"evaluation-{method}.json", _json(record))
    card = export_card(
        trained, evaluations, command=command, stored=args.store, license=args.license
    )
    write_atomically(made / CARD, card)
    write_manifest(made)


def _beside(folder: Path, ending: str) -> Path:
    """A hidden name in the same folder, at which nothing is."""
    place = folder.resolve()
    hidden = place.with_name(f".{place.name}.{ending}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
    return hidden


def _replace(folder: Path, made: Path) -> None:
    """Put what was made at `folder`, in place of an earlier export."""
    old = _beside(folder, "old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def _records(run: str) -> tuple[dict[str, Any], int]:
    """``protocol.json`` of a run, and its steps."""
    protocol, state = run_record(run), run_record(run, "trainer_state.json")
    if not protocol or "global_step" not in state:
        raise UserError(
            f"--model: {run} lacks protocol.json or trainer_state.json, which say how it was "
            "trained; take the folder that `calm train` or `calm train-ar` has written"
        )
    return protocol, state["global_step"]


def _check_output(folder: Path, may_overwrite: bool) -> None:
    """Raise unless `folder` is new, empty or, if it may be replaced, an export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is no folder")
    names = {path.name for path in folder.iterdir()}
    if names and not may_overwrite:
        raise UserError(f"--output {folder} is not empty; pass --overwrite, or another folder")
    if strange := sorted(names - _exported(folder)):
        raise UserError(f"--output {folder}: no export has written {strange[0]}; remove it")


def _exported(folder: Path) -> set[str]:
    """Names of what an export has written there."""
    from calm.integrity import MANIFEST, listed_names

    names = listed_names(folder)
    return {MANIFEST, *names} if "evaluation-direct.json" in names else set()


def _methods(model: Any) -> tuple[str, ...]:
    """What of the model draws; a CALM has draws of its readout too if it has kept one."""
    has_readout = getattr(model, "token_readout", None) is not None
    return ("direct", "readout") if has_readout else ("direct",)


def _flags_of_eval(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(words)


def _command(args: argparse.Namespace, name: str) -> str:
    """`calm eval` of the model as a reader of its card types it, without folders of a machine."""
    defaults, words = _flags_of_eval(), ["calm eval --model", name]
    for flag in TEXT_FLAGS:
        if (value := getattr(args, flag)) != getattr(defaults, flag):
            shown = f"{value:g}" if isinstance(value, float) else Path(str(value)).name
            words += [f"--{flag.replace('_', '-')}", shown]
    return " ".join(words)


def _evaluation_flags(args: argparse.Namespace, folder: Path, method: str) -> argparse.Namespace:
    """Those of `calm eval` for the saved model: its defaults, on the text of `args`."""
    flags = _flags_of_eval("--model", str(folder), "--method", method)
    flags.device, flags.trust_remote_code = args.device, args.trust_remote_code
    for name in TEXT_FLAGS:
        setattr(flags, name, getattr(args, name))
    return flags


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
