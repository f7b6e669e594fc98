"""Time on the device: a captured graph of many launches over rotating buffers, medians."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Measurement", "measure"]

LAUNCHES, REPLAYS, WARMUP = 20, 15, 3
Work = Callable[[int], object]  # takes the number of a buffer


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call (median and 20/80 % quantiles) and its peak memory beyond the
    inputs.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    peak_memory_bytes: int
    is_captured: bool


def _timed(run: Callable[[], object], launches: int) -> list[float]:
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return times


def _capture(work: Work, buffers: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            work(index % buffers)
    return graph


def peak_memory_bytes(work: Work) -> int:
    """Memory that one call needs beyond what is live before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(work: Work, buffers: int, *, can_capture: bool = True) -> Measurement:
    """Time `work`, called with buffer numbers below `buffers` in turn.

    Work that cannot be captured (it waits for the device, or needs too much memory twenty times) is
    timed call by call, launch gaps included.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which fills the buffers
    with torch.cuda.stream(side):
        for index in range(WARMUP):
            work(index % buffers)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    peak = peak_memory_bytes(work)
    if can_capture:
        graph = _capture(work, buffers)
        graph.replay()
        times = _timed(graph.replay, LAUNCHES)
    else:
        times = _timed(lambda: [work(index % buffers) for index in range(2)], 2)
    low, *_, high = quantiles = statistics.quantiles(times, n=5)
    assert len(quantiles) == 4
    return Measurement(statistics.median(times), low, high, peak, can_capture)


def rotating(make: Callable[[int], Sequence[torch.Tensor]], bytes_each: int) -> list:
    """Enough sets of inputs that together they do not fit into the device's cache."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    return [make(seed) for seed in range(max(2, min(16, 1 + 3 * cache // max(1, bytes_each))))]
