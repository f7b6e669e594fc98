"""Versions, devices, and the implementation that is chosen for each operation."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from calm_kernels import backend as kernels

__all__ = ["collect", "describe"]

PACKAGES = (
    "calm-lm",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "numpy",
    "matplotlib",
)


def collect() -> dict[str, Any]:
    """Everything as nested dictionaries that JSON can hold."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
        "backend": {
            "setting": os.environ.get(kernels.ENVIRONMENT_VARIABLE) or kernels.Backend.AUTO.value,
            "triton_interpreter": kernels.is_interpreted(),
            "operations": _operations(device),
        },
        "triton_cache": _triton_cache(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The result of `collect` as text."""
    packages, cpu = facts["packages"], facts["cpu"]
    lines = [
        f"python        {facts['python']} ({sys.executable})",
        f"platform      {facts['platform']}",
        f"cpu           {cpu['cores']} cores, {cpu['torch_threads']} torch threads",
    ]
    for index, gpu in enumerate(facts["gpus"]):
        lines.append(
            f"gpu {index}         {gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
        )
    driver = facts["driver"]
    cache = facts["triton_cache"]
    lines += [
        f"driver        {driver['state']}",
        f"torch build   {driver['torch_build']}",
        f"triton cache  {cache['folder']} ({cache['state']})",
        "",
        "packages",
        *(f"  {name:14} {found or 'not installed'}" for name, found in packages.items()),
        "",
        f"backends (setting: {facts['backend']['setting']})",
        *(
            f"  {name:22} {entry['chosen']:10} available: {', '.join(entry['available'])}"
            for name, entry in facts["backend"]["operations"].items()
        ),
    ]
    return "\n".join(lines)


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None; for torch with its build, as in ``2.9+cpu``."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _operations(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each operation its backends, and the one that runs on `device` or why none does."""
    probe = torch.empty(0, device=device)
    table = {}
    for name, available in kernels.OPERATIONS.items():
        try:
            chosen = kernels.resolve(kernels.Backend.AUTO, name, probe).value
        except (ValueError, NotImplementedError, ImportError) as error:
            chosen = f"error: {error}"
        table[name] = {"chosen": chosen, "available": sorted(entry.value for entry in available)}
    return table


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    is_amd = torch.version.hip is not None
    return {
        "name": facts.name,
        "architecture": facts.gcnArchName if is_amd else f"compute {facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
    }


def _driver() -> dict[str, str]:
    """The GPU driver, and what this torch build needs."""
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    else:
        build = "CPU only"
    if torch.cuda.is_available():
        state = f"working ({_driver_version() or 'version unknown'})"
    elif build == "CPU only":
        state = "not used: this torch build has no GPU support"
    else:
        state = f"no usable GPU: this torch build wants {build} and finds no device"
    return {"torch_build": build, "state": state}


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.hip:
        command = ["rocm-smi", "--showdriverversion", "--csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _triton_cache() -> dict[str, str]:
    """Folder of compiled kernels, and whether it can be written."""
    chosen = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(chosen) if chosen else home / ".triton" / "cache"
    if folder.is_dir():
        state = "writable" if os.access(folder, os.W_OK) else "not writable"
    else:
        state = "not there yet"
    return {"folder": str(folder), "state": state}
