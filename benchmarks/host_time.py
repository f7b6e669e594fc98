"""``python -m benchmarks.host_time``: what a call of each operation costs the host, without a GPU.

Every kernel is replaced by a launch that does nothing, and tensors are tiny and on the CPU. What is
timed is the rest of the Triton backend: checks, the choice of backend, constants of launches,
memory for results, autograd. A GPU adds Triton's own launcher, which is not ours, and hides all of
it while it is busy. The last column divides by a plain torch call of the same run, the sum of an
elementwise product with its gradient where a row has one: a busy machine slows both.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import calm_kernels
from calm_kernels import (
    EnergyHead,
    agreeing_patch,
    energy_score,
    gaussian_energy_score,
    linear_argmax,
    linear_cross_entropy,
    reparameterize,
)

__all__ = ["Row", "main", "measure_all"]


@dataclass(frozen=True)
class Row:
    """Host time of one call: the least of many, in microseconds."""

    operation: str
    work: str
    launches: int
    microseconds: float
    plain_calls: float  # as many plain torch calls take as long


class _Launches:
    """Stands for every kernel; counts its launches."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **constants: Any) -> None:
        self.count += 1


@contextmanager
def stub_launches() -> Iterator[_Launches]:
    """No kernel runs inside, and CPU tensors are taken by the Triton backend."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    stub, replaced = _Launches(), []
    for found in pkgutil.walk_packages(calm_kernels.__path__, "calm_kernels."):
        if found.name.endswith("kernels"):
            module = importlib.import_module(found.name)
            replaced += [(module, name) for name in vars(module) if name.endswith("_kernel")]
    kernels = [(module, name, getattr(module, name)) for module, name in replaced]
    for module, name, _ in kernels:
        setattr(module, name, stub)
    try:
        yield stub
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


Call = Callable[[], torch.Tensor]


def _calls() -> Iterator[tuple[str, str, Call, bool]]:
    """Operation, work, the call, and whether a backward pass follows."""
    torch.manual_seed(0)
    seed = torch.tensor([1, 0])
    mean, log_std = torch.zeros(2, 64), torch.zeros(2, 64)
    samples = torch.zeros(2, 4, 64).transpose(0, 1)
    for targets in ("analytic", "antithetic"):

        def score(x: torch.Tensor, targets: str = targets) -> torch.Tensor:
            return gaussian_energy_score(x, mean, log_std, targets=targets, seed=seed)

        yield from _both("gaussian_energy_score", f", {targets}", score, samples)
    points = torch.zeros(8, 2, 64)
    yield from _both("energy_score", "", lambda x: energy_score(x, points), samples)
    states = torch.zeros(2, 128)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return reparameterize(x, kl_floor=0.5, dropout=0.1, seed=seed)[0]

    yield from _both("reparameterize", "", draw, states)
    head, hidden = EnergyHead(64, 16, 8, 4), torch.zeros(2, 64)
    yield from _both("energy_head", "", lambda x: head.sample(x, num_samples=4, seed=seed), hidden)
    weight, labels = torch.zeros(32, 64), torch.zeros(2, dtype=torch.int64)
    yield from _both(
        "linear_cross_entropy", "", lambda x: linear_cross_entropy(x, weight, labels), hidden
    )
    yield "linear_argmax", "forward", lambda: linear_argmax(hidden, weight), False
    candidates = torch.zeros(2, 9, 4, dtype=torch.int64)
    yield "agreeing_patch", "forward", lambda: agreeing_patch(candidates, 2, seed=seed)[0], False


def _both(
    operation: str, note: str, function: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor
) -> Iterator[tuple[str, str, Call, bool]]:
    leaf = value.clone().requires_grad_()
    yield operation, f"forward{note}", lambda: function(value), False
    yield operation, f"forward + backward{note}", lambda: function(leaf), True


def _seconds(call: Call, has_backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(has_backward):
        result = call()
        if has_backward:
            result.sum().backward()
    return time.perf_counter() - start


def measure_all(repeats: int) -> Iterator[Row]:
    """Every operation, forward alone and with its backward pass, in turn with the plain call."""
    vector = torch.zeros(64)
    leaf = vector.clone().requires_grad_()

    def plain() -> torch.Tensor:
        return (leaf * vector).sum()

    with stub_launches() as stub:
        for operation, work, call, has_backward in _calls():
            _seconds(call, has_backward)  # imports, and what is computed once
            before = stub.count
            _seconds(call, has_backward)
            launches = stub.count - before
            times = [
                (_seconds(call, has_backward), _seconds(plain, has_backward))
                for _ in range(repeats)
            ]
            least, least_plain = (1e6 * min(column) for column in zip(*times, strict=True))
            yield Row(operation, work, launches, least, least / least_plain)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=500, help="calls of which the least counts")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'operation':<22} {'work':<32} launches     µs  plain calls")
    for row in measure_all(arguments.repeats):
        print(
            f"{row.operation:<22} {row.work:<32} {row.launches:8} {row.microseconds:6.0f}"
            f" {row.plain_calls:12.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
