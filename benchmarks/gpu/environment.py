"""``python -m benchmarks.gpu.environment``: what this machine is, and what it reaches at most."""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.work import write
from benchmarks.machine import current_commit
from calm_kernels.tuning import architecture

__all__ = ["environment", "main"]


def environment() -> dict[str, Any]:
    """Device and versions, which a reader needs to repeat the run."""
    return {
        "device": torch.cuda.get_device_name(),
        "architecture": architecture(torch.device("cuda")),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": current_commit(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: benchmarks.gpu needs a GPU", file=sys.stderr)
        return 2
    row = {**environment(), **asdict(measure_ceilings())}
    print(json.dumps(row, indent=1))
    write(arguments.output / "environment.json", {"rows": [row]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
