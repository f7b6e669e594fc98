"""Times ours and its rivals in turn in one run, and the peak of allocated memory."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Requirement", "compare", "peak_memory_bytes"]

Run = Callable[[], object]
ROUNDS, WARMUP_ROUNDS = 7, 2


@dataclass(frozen=True)
class Requirement:
    """What a comparison has to reach: rival / ours in time, ours / rival in peak memory."""

    rival: str
    min_speedup: float
    max_memory_share: float | None = None


def peak_memory_bytes(run: Run) -> int:
    """Largest sum of live CPU allocations that `run` makes, beyond what was live before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def compare(
    benchmark,
    ours: Run,
    rivals: Mapping[str, Run],
    *,
    shape: object,
    requirements: tuple[Requirement, ...] = (),
    rounds: int = ROUNDS,
) -> None:
    """Time `ours` through pytest-benchmark, and every rival once before each of its rounds.

    Medians, ratios and peak memory go into ``extra_info``. The caller has asserted parity.
    """
    rival_ms: dict[str, list[float]] = {name: [] for name in rivals}
    for run in (*rivals.values(), ours):
        for _ in range(WARMUP_ROUNDS):
            run()

    def time_rivals() -> None:
        for name, run in rivals.items():
            rival_ms[name].append(_milliseconds(run))

    benchmark.pedantic(ours, setup=time_rivals, rounds=rounds)
    ours_ms = benchmark.stats.stats.median * 1e3
    ours_bytes = peak_memory_bytes(ours)
    rows = {}
    for name, run in rivals.items():
        median, peak = statistics.median(rival_ms[name]), peak_memory_bytes(run)
        rows[name] = {
            "median_ms": median,
            "speedup": median / ours_ms,
            "peak_memory_bytes": peak,
            "memory_share": ours_bytes / peak if peak else None,
        }
    benchmark.extra_info.update(
        shape=asdict(shape),
        median_ms=ours_ms,
        peak_memory_bytes=ours_bytes,
        rivals=rows,
        requirements=[asdict(requirement) for requirement in requirements],
        num_threads=torch.get_num_threads(),
    )
