"""Times ours and its baselines in turn in one run, and the peak of allocated memory.

Nothing is timed before every baseline has shown that it computes what ours computes.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from calm.timing import Baseline, Run, assert_parity, milliseconds

__all__ = ["Baseline", "Requirement", "compare", "peak_memory_bytes"]

ROUNDS, WARMUP_ROUNDS = 7, 2


@dataclass(frozen=True)
class Requirement:
    """What a comparison has to reach: baseline / ours in time, ours / baseline in peak memory."""

    baseline: str
    min_speedup: float
    max_memory_share: float | None = None


def peak_memory_bytes(run: Run) -> int:
    """Largest sum of live CPU allocations that `run` makes, beyond what was live before it."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def compare(
    benchmark,
    ours: Run,
    baselines: Mapping[str, Baseline],
    *,
    shape: object,
    requirements: tuple[Requirement, ...] = (),
    rounds: int = ROUNDS,
) -> None:
    """Assert parity; then time `ours` by pytest-benchmark, each baseline once before each round.

    Medians, ratios and peak memory go into ``extra_info``.
    """
    assert_parity(ours, baselines)
    times: dict[str, list[float]] = {name: [] for name in baselines}
    for run in (*(baseline.run for baseline in baselines.values()), ours):
        for _ in range(WARMUP_ROUNDS):
            run()

    def time_baselines() -> None:
        for name, baseline in baselines.items():
            times[name].append(milliseconds(baseline.run))

    benchmark.pedantic(ours, setup=time_baselines, rounds=rounds)
    ours_ms = benchmark.stats.stats.median * 1e3
    ours_bytes = peak_memory_bytes(ours)
    rows = {}
    for name, baseline in baselines.items():
        median, peak = statistics.median(times[name]), peak_memory_bytes(baseline.run)
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
        baselines=rows,
        requirements=[asdict(requirement) for requirement in requirements],
        num_threads=torch.get_num_threads(),
    )
