"""`calm serve`: models behind OpenAI's interface."""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

from calm.commands.model_flags import (
    add_loading_arguments,
    load_model,
    load_tokenizer_of,
    say_default,
)
from calm.errors import UserError
from calm.pretrained import PRETRAINED, packaged, pretrained_path
from calm.ranges import POSITIVE, Range, at_least, number

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
  calm serve                                      the models that come with the package
  calm serve --model runs/demo/calm
  calm serve --model runs/demo/calm --model runs/demo/baseline --port 8080
  calm serve --model story=runs/mine/checkpoint-4000 --method readout
  calm serve --model runs/demo/calm --host 0.0.0.0 --api-key-file key.txt

Any client of OpenAI's finds it at http://127.0.0.1:8000/v1, a browser finds a playground at
http://127.0.0.1:8000/ (docs/serving.md). Ctrl-C lets texts be finished, a second one does not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the subcommand."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]DIR",
        help="folder of a trained CALM or baseline; may be repeated. Requests name it by the "
        f"folder's name, or by NAME (default: {' and '.join(PRETRAINED)}, which come with the "
        "package)",
    )
    add_loading_arguments(parser)
    _add_sampling_arguments(parser)
    _add_limit_arguments(parser)
    _add_network_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=("batch", "exact", "medoid", "noise_scale", "amortized", "readout"),
        default="batch",
        help="how a CALM's chunks are chosen, unless a request says so (default: batch)",
    )
    parser.add_argument(
        "--num-samples",
        type=number(int, at_least(1)),
        default=200,
        metavar="N",
        help="candidates for each chunk below temperature 1, likewise (default: 200)",
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots",
        type=number(int, at_least(1)),
        default=8,
        metavar="W",
        help="texts of a model that are written at once (default: 8)",
    )
    parser.add_argument(
        "--max-waiting",
        type=number(int, at_least(0)),
        default=64,
        metavar="Q",
        help="texts of a model that wait beside them; more get status 429 (default: 64)",
    )
    parser.add_argument(
        "--context",
        type=number(int, at_least(1)),
        metavar="T",
        help="tokens of prompt and text at most; a cache of this length is kept for every slot "
        "(default: what the model can read)",
    )
    parser.add_argument(
        "--max-num-samples",
        type=number(int, at_least(1)),
        default=1000,
        metavar="N",
        help="candidates for each chunk that a request may ask for (default: 1000)",
    )
    parser.add_argument(
        "--max-body",
        type=number(int, at_least(1)),
        default=1 << 20,
        metavar="BYTES",
        help="of a request at most (default: 1 MiB)",
    )


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 for all of this machine (default: 127.0.0.1, which "
        "this machine alone can reach)",
    )
    parser.add_argument(
        "--port", type=number(int, Range(0, 65535)), default=8000, help="0 for any (default: 8000)"
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="its first line is the key that requests must bring (default: none is needed)",
    )
    parser.add_argument(
        "--shutdown-seconds",
        type=number(int, POSITIVE),
        default=30,
        metavar="S",
        help="for texts to be finished after Ctrl-C or a TERM signal (default: 30)",
    )
    parser.add_argument("--access-log", action="store_true", help="print a line for each request")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or a TERM signal."""
    from calm.serving.app import Access, make_app
    from calm.serving.server import bind, is_loopback, make_server

    if args.model is None:
        args.model = [f"{name}={pretrained_path(name)}" for name in PRETRAINED]
        say_default(*PRETRAINED)
    folders = _folders(args.model)
    api_key = None if args.api_key_file is None else _read_key(Path(args.api_key_file))
    with bind(args.host, args.port) as sock:
        if api_key is None and not is_loopback(sock):
            print(
                "warning: without --api-key-file everybody who can reach this machine can use "
                "the server",
                file=sys.stderr,
            )
        models = [_served(args, name, folder) for name, folder in folders.items()]
        app = make_app(models, Access(api_key=api_key, max_body=args.max_body))
        server = make_server(
            app, shutdown_seconds=args.shutdown_seconds, logs_access=args.access_log
        )
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"serving {', '.join(folders)} at http://{shown}:{port}/v1, with a playground at "
            f"http://{shown}:{port}/ (Ctrl-C ends)",
            file=sys.stderr,
            flush=True,
        )
        server.run(sockets=[sock])
    return 0


def _folders(names: list[str]) -> dict[str, str]:
    """Folder of each model by the name that requests use."""
    found: dict[str, str] = {}
    for text in names:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():
            name, folder = Path(text).resolve().name, text
        folder = packaged(folder)
        if not name or not folder or "/" in name:
            raise UserError(f"--model takes DIR or NAME=DIR, a NAME without slash; got {text!r}")
        if name in found:
            raise UserError(f"--model: {found[name]} and {folder} are both {name}; use NAME=DIR")
        found[name] = folder
    return found


def _served(args: argparse.Namespace, name: str, folder: str) -> Any:
    """A model with its slots."""
    from calm.memory import check_draws
    from calm.serving.models import Limits, ServedModel

    own = copy.copy(args)
    own.model = folder
    model = load_model(own)
    check_draws(model, "--max-num-samples", args.max_num_samples, 1)
    limits = Limits(
        num_slots=args.slots,
        max_waiting=args.max_waiting,
        context=args.context,
        max_num_samples=args.max_num_samples,
    )
    tokenizer = load_tokenizer_of(own, model)
    return ServedModel(
        name, model, tokenizer, limits, method=args.method, num_samples=args.num_samples
    )


def _read_key(path: Path) -> str:
    """The first line of a file, without spaces around it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    key = lines[0].strip() if lines else ""
    if not key or not key.isascii():
        raise UserError(f"--api-key-file {path}: the first line must be a key of ASCII characters")
    return key
