"""The flags that name a model, and the model and tokenizer that they stand for.

torch and transformers are imported where they are used: the help of a command needs neither.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.commands.text_flags import add_trust_argument
from calm.errors import UserError
from calm.pretrained import DEFAULT, PRETRAINED, packaged, pretrained_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "add_loading_arguments",
    "add_model_arguments",
    "choose_model",
    "load_model",
    "load_tokenizer_of",
    "model_folder",
    "read_config",
    "say_default",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(
    parser: argparse.ArgumentParser, default: str | None = None, *, is_required: bool = False
) -> None:
    """The flags that say which model to load, and how.

    Args:
        parser: of the command.
        default: the folder without a flag; None leaves it to `choose_model`.
        is_required: whether the flag must be given.
    """
    shown = "" if is_required else f" (default: {default or DEFAULT})"
    parser.add_argument(
        "--model",
        required=is_required,
        default=default,
        type=model_folder,
        metavar="DIR",
        help="folder of a trained CALM or baseline, or a model that comes with the package, see "
        f"`calm pretrained`{shown}",
    )
    add_loading_arguments(parser)


def model_folder(text: str) -> str:
    """A flag's value, or the folder of the model of this name that comes with the package."""
    try:
        return packaged(text)
    except UserError as error:  # which argparse would not show
        raise argparse.ArgumentTypeError(str(error)) from error


def choose_model(args: argparse.Namespace) -> None:
    """Without ``--model``: the one that comes with the package, which standard error then says."""
    if args.model is None:
        args.model = str(pretrained_path())
        say_default(DEFAULT)


def say_default(*names: str, flag: str = "--model") -> None:
    """Say that models of these names, which come with the package, were chosen without `flag`."""
    verb = "comes" if len(names) == 1 else "come"
    print(
        f"model: {' and '.join(names)}, which {verb} with the package ({flag} takes another)",
        file=sys.stderr,
        flush=True,
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how models are loaded."""
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder, hub name or 'bytes' (default: the one saved with the model)",
    )
    add_trust_argument(parser)
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: the file's)"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "reference", "torch", "triton"),
        help="implementation of the operations (default: the best for the device)",
    )


def load_model(args: argparse.Namespace, argument: str = "--model") -> "PreTrainedModel":
    """The model that the flags of `add_model_arguments` name, in evaluation mode.

    Args:
        args: the flags; ``args.model`` is its folder.
        argument: where the command line names it, for messages.

    Raises:
        UserError: no such folder, nothing that can be loaded in it, or the wrong kind of model.
    """
    folder = Path(args.model)
    config = read_config(folder, argument)  # a wrong path need not wait for the imports
    from calm.configuration import model_kind
    from calm.models import MODEL_CLASSES, BaselineTransformer
    from calm.models.loading import load_checked

    kind = model_kind(config)
    if kind == "autoencoder":
        raise UserError(
            f"{folder} holds an autoencoder; pass the folder of a language model trained on it"
        )
    if kind not in (*MODEL_CLASSES, "baseline"):
        raise UserError(f"{folder} holds a {kind!r} model, neither a CALM nor the token baseline")
    model_class: Any = MODEL_CLASSES.get(kind, BaselineTransformer)
    device = _device(args.device)
    model: Any = load_checked(model_class, str(folder), argument, dtype=args.dtype)
    return model.to(device).eval()


def load_tokenizer_of(
    args: argparse.Namespace, model: "PreTrainedModel"
) -> "PreTrainedTokenizerBase":
    """The tokenizer that ``--tokenizer`` names, else the one beside the model."""
    from calm.data.encoding import vocabulary_size
    from calm.data.tokenizer import load_tokenizer

    name = args.tokenizer or args.model
    if args.tokenizer is None and not list(Path(name).glob("tokenizer*")):
        raise UserError(f"{name} holds no tokenizer; pass one with --tokenizer")
    argument = "--model" if args.tokenizer is None else "--tokenizer"
    tokenizer = load_tokenizer(name, argument=argument, trust_remote_code=args.trust_remote_code)
    needed = vocabulary_size(tokenizer)
    if needed > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {name} needs {needed} entries, more than the vocabulary of the "
            f"model, {model.config.vocab_size}; pass the one it was trained with (--tokenizer)"
        )
    return tokenizer


def read_config(folder: Path, argument: str = "--model") -> dict[str, Any]:
    """``config.json`` of a model folder, which `argument` names."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}; {argument} takes the folder of a saved model, or a model that "
            f"comes with the package: {', '.join(PRETRAINED)}"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json{_hint(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no mapping")
    return config


def _hint(folder: Path) -> str:
    """The end of an error message: which folders in `folder` hold models, if any."""
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; it has model folders in it: {', '.join(found)}" if found else ""


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise UserError(f"--device must be cpu, cuda or cuda:<index>, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here (see `calm env`)")
    return device
