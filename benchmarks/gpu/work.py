"""One thing to time, and the row that its measurement becomes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import Ceilings

__all__ = [
    "Measurement",
    "Work",
    "assert_close",
    "cache_bytes",
    "failure",
    "named",
    "relative_error",
    "row_of",
    "write",
]

MAX_ERROR = 2000  # characters; a compiler's message may be longer than all results


@dataclass(frozen=True)
class Work:
    """A call to time: what it computes, who computes it, its shape, and the least it must move."""

    operation: str
    label: str  # what is computed: "forward + gradient"
    name: str  # who computes it: "triton" or a baseline
    shape: dict[str, Any]
    run: Callable[[int], Any]  # takes the number of a buffer
    buffers: int
    traffic: int  # bytes that must move, whoever computes it
    flops: int = 0  # of GEMMs on tensor cores
    can_capture: bool = True  # into a CUDA graph, because it never waits for the device
    missing: str = ""  # why this baseline cannot run here


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call (median, 20 and 80 % quantiles), its peak memory beyond the inputs,
    and how it was timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    peak_memory_bytes: int
    is_captured: bool
    launches: int


def named(work: Work) -> dict[str, Any]:
    """What a row is about."""
    return {
        "operation": work.operation,
        "work": work.label,
        "name": work.name,
        "shape": work.shape,
    }


def row_of(work: Work, found: Measurement, ceilings: Ceilings | None) -> dict[str, Any]:
    """A row of the results; its floor is the least time at `ceilings`, None if they are unknown."""
    floor_ms = None if ceilings is None else ceilings.floor_ms(work.traffic, work.flops)
    return {
        **named(work),
        **asdict(found),
        "buffers": work.buffers,
        "gigabytes_per_second": work.traffic / found.median_ms / 1e6,
        "teraflops": work.flops / found.median_ms / 1e9,
        "floor_ms": floor_ms,
        "share_of_floor": None if floor_ms is None else floor_ms / found.median_ms,
    }


def failure(error: Exception) -> dict[str, Any]:
    """What a row holds in place of a measurement that failed."""
    return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}


def cache_bytes(device: str) -> int:
    """Size of the device's second-level cache; 0 on a CPU, where nothing is timed."""
    if device == "cpu":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    truth = truth.double()
    return float((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_close(
    actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float, label: str
) -> None:
    """Parity before anything is timed."""
    for ours, theirs in zip(actual, expected, strict=True):
        error = relative_error(ours, theirs)
        assert error < tolerance, f"{label}: relative error {error:.1e}; nothing is timed"


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results so far, whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
