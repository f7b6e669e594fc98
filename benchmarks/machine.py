"""What a reader needs to know about the machine and the version behind a number."""

import os
import platform
import subprocess
import sys
from typing import Any

import torch

__all__ = ["current_commit", "load_average", "machine_info"]

IDLE_LOAD = 0.5


def machine_info(threads: int) -> dict[str, Any]:
    """Processor, threads and versions; no host name, no path."""
    return {
        "processor_name": _processor_name(),
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "torch": torch.__version__,
        "python_version": platform.python_version(),
        "system": platform.system(),
    }


def load_average() -> float:
    """Of the last minute; a warning where other programs run too."""
    found = os.getloadavg()[0]
    if found > IDLE_LOAD:
        print(f"warning: other programs run too (load average {found:.1f}): the times are "
              "not to be quoted", file=sys.stderr)  # fmt: skip
    return found


def current_commit(folder: str | os.PathLike[str] | None = None) -> str:
    """The commit that is checked out in `folder`; empty where git knows none, or is missing."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError:
        return ""
    return found.stdout.strip()


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
