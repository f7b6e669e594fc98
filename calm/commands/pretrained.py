"""`calm pretrained`: the models that come with the package."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm pretrained
  calm pretrained --json
  calm generate --model calm-docstrings-baseline --prompt "Returns the "

Flags that take the folder of a model take these names, too, and so does from_pretrained of the
classes of calm; calm.pretrained_path(NAME) is the folder, for everything else. BrierLM (0 to 100)
and its 95 % interval are those of the model's card, README.md in its folder.

--json prints for each model: name, kind, parameters (those of a CALM without and those of its
autoencoder), bytes, path, and brier_lm: value and interval by what draws.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from calm.pretrained import PRETRAINED, pretrained_path

    models = [_describe(name, pretrained_path(name)) for name in PRETRAINED]
    if args.json:
        print(json.dumps(models, indent=2))
    else:
        print("\n".join(_lines(model) for model in models))
    return 0


def _describe(name: str, folder: Path) -> dict[str, Any]:
    """A model, from its files."""
    from calm.commands.model_flags import read_config
    from calm.configuration import model_kind
    from calm.integrity import check_files, saved_shapes

    check_files(folder)
    kind = model_kind(read_config(folder))
    sizes = {weight: math.prod(shape) for weight, shape in saved_shapes(folder).items()}
    inside = sum(size for weight, size in sizes.items() if weight.startswith("ae_model."))
    scores = {
        path.stem.removeprefix("evaluation-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("evaluation-*.json"))
    }
    return {
        "name": name,
        "kind": kind,
        "parameters": sum(sizes.values()) - inside,
        "autoencoder_parameters": inside,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "path": str(folder),
        "brier_lm": {
            method: {"value": record["brier_lm"], "interval": record["brier_lm_interval"]}
            for method, record in scores.items()
        },
    }


def _lines(model: dict[str, Any]) -> str:
    """A model, for people."""
    inside = model["autoencoder_parameters"]
    scores = [
        f"{score['value']:.2f} [{score['interval'][0]:.2f}, {score['interval'][1]:.2f}], {method}"
        for method, score in model["brier_lm"].items()
    ]
    return "\n".join([
        model["name"],
        f"  {model['kind']}, {model['parameters'] / 1e6:.2f} M parameters"
        + (f" and an autoencoder of {inside / 1e6:.2f} M" if inside else "")
        + f", {model['bytes'] / 1e6:.2f} MB",
        f"  BrierLM {'; '.join(scores)}",
        f"  {model['path']}",
    ])  # fmt: skip
