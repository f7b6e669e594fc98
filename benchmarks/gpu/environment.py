"""``python -m benchmarks.gpu.environment``: what this machine is, and what it reaches at most."""

import json
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch
import triton

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.work import write
from benchmarks.machine import current_commit
from calm_kernels.tuning import architecture

__all__ = ["environment", "main"]


def environment(device: str = "cuda") -> dict[str, Any]:
    """Device and versions, which a reader needs to repeat the run."""
    return {
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
        "architecture": architecture(torch.device(device)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": current_commit(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    row = {**environment(device), **asdict(measure_ceilings(device))}
    print(json.dumps(row, indent=1))
    write(arguments.output / "environment.json", {"rows": [row]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
