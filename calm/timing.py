"""Alternatives timed in turn, once each has shown that it computes the same."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Baseline", "Run", "Spread", "assert_parity", "in_turn", "milliseconds"]

Run = Callable[[], object]
Check = Callable[[], None]


@dataclass(frozen=True)
class Baseline:
    """What ours is timed against.

    Attributes:
        run: one call.
        check: raises AssertionError unless `run` computes what ours computes; for runs with draws
            of their own. If None, the outputs of both are compared.
        rtol: relative tolerance of that comparison.
        atol: its absolute tolerance.
    """

    run: Run
    check: Check | None = None
    rtol: float = 1e-3
    atol: float = 1e-5


@dataclass(frozen=True)
class Spread:
    """Times of one thing.

    Attributes:
        median: of all rounds, like the others in milliseconds.
        low: a fifth of them were faster.
        high: a fifth of them were slower.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> "Spread":
        """The spread of at least two times."""
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), fifths[0], fifths[-1])


def assert_parity(ours: Run, baselines: Mapping[str, Baseline]) -> None:
    """Every baseline computes what `ours` does.

    Raises:
        AssertionError: one does not; its name is in the message.
    """
    for name, baseline in baselines.items():
        try:
            if baseline.check is not None:
                baseline.check()
            else:
                torch.testing.assert_close(
                    ours(), baseline.run(), rtol=baseline.rtol, atol=baseline.atol
                )
        except AssertionError as error:
            raise AssertionError(f"{name!r} and ours differ, nothing is timed: {error}") from error


def milliseconds(run: Run) -> float:
    """Wall time of one call on the host."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def in_turn(runs: Mapping[str, Run], rounds: int, warmup_rounds: int = 1) -> dict[str, Spread]:
    """Times of `runs`, each once in every round, so that what else the machine does hits all."""
    for _ in range(warmup_rounds):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: Spread.of(found) for name, found in times.items()}
