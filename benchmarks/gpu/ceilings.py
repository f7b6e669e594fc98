"""What this device reaches at most: a large copy and a large GEMM, measured before anything else.

Devices of one architecture differ (an H100 copies at about 3.0 TB/s, an H200 at 4.3), so floors
and shares are of these two figures.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["Ceilings", "measure_ceilings"]

SIZES, TINY = (1 << 30, 8192), (1 << 16, 32)  # bytes of the copy, width of the matrices
CALLS, BATCHES = 10, 5  # calls that are timed together, and how often


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that a copy reads and writes, and bf16 operations a second of a GEMM."""

    bandwidth: float
    tensor_rate: float

    def floor_ms(self, traffic: float, flops: float) -> float:
        """Least milliseconds for so many bytes and operations, done at the same time."""
        return 1e3 * max(traffic / self.bandwidth, flops / self.tensor_rate)


def measure_ceilings(device: str = "cuda") -> Ceilings:
    """Copy so many bytes, multiply two square bf16 matrices of random numbers."""
    copy_bytes, size = TINY if device == "cpu" else SIZES
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy_seconds = _seconds(partial(copy.copy_, source), device)
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(left)
    gemm_seconds = _seconds(partial(torch.mm, left, right, out=product), device)
    return Ceilings(2 * copy_bytes / copy_seconds, 2 * size**3 / gemm_seconds)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of one call, the median of batches after a first that does not count."""

    def batch() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / CALLS

    return statistics.median([batch() for _ in range(BATCHES + 1)][1:])
