"""Time on the device: the median of a captured graph of many launches over rotating buffers."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.work import Measurement, Work

__all__ = ["measure", "measure_on_cpu", "num_buffers"]

LAUNCHES, REPLAYS, WARMUP = 20, 15, 3
ENOUGH_MS = 100.0  # time of the launches that are timed together
CACHE_MULTIPLE = 4  # size of all buffers of a work, in sizes of the device's cache


def num_buffers(bytes_each: int, cache_bytes: int) -> int:
    """Number of input buffers, at least two; each has left the cache before its next use."""
    return max(2, math.ceil(CACHE_MULTIPLE * cache_bytes / max(1, bytes_each)))


def num_warmups(buffers: int) -> int:
    """Calls before the first that counts: torch.compile may compile again for any buffer, which a
    capture would not survive.
    """
    return max(WARMUP, buffers)


def num_launches(buffers: int, call_ms: float = 0.0) -> int:
    """About `LAUNCHES`, fewer of long calls; every buffer is used equally often."""
    wanted = min(LAUNCHES, ENOUGH_MS / max(call_ms, 1e-3))
    return math.ceil(wanted / buffers) * buffers


def _timed(run: Callable[[], object], launches: int, repeats: int = REPLAYS) -> list[float]:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return times


def _call(work: Work, launches: int) -> None:
    for index in range(launches):
        work.run(index % work.buffers)


def _capture(work: Work, launches: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The graph and its results, which are kept so that each launch writes to memory of its own."""
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for index in range(launches):
            results.append(work.run(index % work.buffers))
    return graph, results


def _peak_memory_bytes(work: Work) -> int:
    """Memory that one call needs beyond what is live before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work.run(0)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(work: Work) -> Measurement:
    """Time `work` over its buffers in turn.

    A call that waits for the device cannot be captured. It is timed as it is called, with the gaps
    between launches, and its row says so.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which fills the buffers
    with torch.cuda.stream(side):
        _call(work, num_warmups(work.buffers))
    torch.cuda.current_stream().wait_stream(side)
    peak = _peak_memory_bytes(work)
    launches = num_launches(work.buffers, min(_timed(lambda: _call(work, 1), 1, repeats=2)))
    if work.can_capture:
        graph, _results = _capture(work, launches)
        graph.replay()
        times = _timed(graph.replay, launches)
    else:
        times = _timed(lambda: _call(work, launches), launches)
    low, *_, high = statistics.quantiles(times, n=5)
    return Measurement(statistics.median(times), low, high, peak, work.can_capture, launches)


def measure_on_cpu(work: Work) -> Measurement:
    """One call of `work` as it is; no memory is counted."""
    begin = time.perf_counter()
    work.run(0)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    return Measurement(milliseconds, milliseconds, milliseconds, 0, False, 1)
