"""What the programs of this folder share: flags, the device that they run on, tiny sizes."""

import argparse
import os
from pathlib import Path

import torch

from calm_kernels.backend import ENVIRONMENT_VARIABLE

__all__ = ["make_parser", "read_device"]


def make_parser(description: str | None, output: Path | None = None) -> argparse.ArgumentParser:
    """A parser with ``--output``, required where there is no default, and ``--tiny``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=output, required=output is None)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny sizes on the CPU, to try this program; needs TRITON_INTERPRET=1",
    )
    return parser


def read_device(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """``cuda``, or ``cpu`` with ``--tiny``: kernels are then interpreted where they are asked for
    by name, models run on the torch backend, and nothing is handed to a compiler.

    Raises:
        SystemExit: 2, there is no GPU, or kernels are not interpreted.
    """
    if arguments.tiny:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--tiny needs TRITON_INTERPRET=1")
        os.environ.setdefault(ENVIRONMENT_VARIABLE, "torch")
        torch.compiler.set_stance("force_eager")
        return "cpu"
    if not torch.cuda.is_available():
        parser.error("this program needs a GPU; `make bench` and `make test` run on the CPU")
    return "cuda"
