"""What `calm bench` measures: a CALM's text beside a baseline's, operations beside their formulas.

Nothing is timed before it has shown that it computes what the reference backend computes, which is
the formula. Everything runs on the CPU.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm.timing import Baseline, Spread, assert_parity, in_turn
from calm_kernels import energy_score, gaussian_energy_score, linear_argmax, use_backend

__all__ = ["Speed", "measure_speed"]

OURS, REFERENCE = "ours", "reference"
BASELINE = "baseline, T = 1"
TOKENS, SEED = 64, 5  # of a text
# How a CALM draws; the readout's only where it has one.
DRAWS: dict[str, dict[str, Any]] = {
    "readout, T = 1": {"method": "readout", "temperature": 1.0},
    "head, T = 1": {"method": "direct", "temperature": 1.0},
    "head, T = 1/2 (vote among 200)": {"method": "batch", "temperature": 0.5, "num_samples": 200},
}


class Operation(NamedTuple):
    """An operation at one shape: `run` of a backend gives what is compared and timed."""

    name: str
    shape: str
    run: Callable[[str], object]


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        machine: processor, threads, versions.
        decoding: milliseconds of `TOKENS` tokens, by what draws them; the baseline is last.
        operations: milliseconds of both, by operation and shape.
    """

    machine: dict[str, Any]
    decoding: dict[str, Spread]
    operations: dict[str, dict[str, Spread]]

    def record(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"tokens": TOKENS, **asdict(self)}

    def to_table(self) -> str:
        """For people."""
        width = max(map(len, (*self.decoding, *self.operations)))
        base = self.decoding[BASELINE].median
        rows = [f"{'one text of ' + str(TOKENS) + ' tokens':{width}} {'tokens/s':>9}"
                f"   {'20 to 80 %':>13}   over the baseline"]  # fmt: skip
        for name, times in self.decoding.items():
            speeds = [1e3 * TOKENS / each for each in (times.median, times.high, times.low)]
            rows.append(
                f"{name:{width}} {speeds[0]:9.0f}   {speeds[1]:6.0f} {speeds[2]:6.0f}   "
                f"{base / times.median:.2f}x"
            )
        rows += ["", f"{'operation, forward and backward':{width}} {'ours, ms':>9}   reference, ms"
                 "   over the reference"]  # fmt: skip
        for name, both in self.operations.items():
            ours, reference = both[OURS].median, both[REFERENCE].median
            rows.append(f"{name:{width}} {ours:9.2f}   {reference:13.2f}   {reference / ours:.2f}x")
        rows += ["", ", ".join(f"{key} {value}" for key, value in self.machine.items())]
        return "\n".join(rows)


def measure_speed(model: Any, baseline: Any, prompt: list[int], *, rounds: int) -> Speed:
    """Time everything; one number for each, of the machine as it is now.

    Args:
        model: a CALM on the CPU.
        baseline: a token-by-token model on the CPU.
        prompt: ids that both continue, not empty.
        rounds: times each is run, at least 2.

    Raises:
        AssertionError: something computes other numbers than the reference backend.
    """
    return Speed(
        {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        _time_decoding(model, baseline, prompt, rounds),
        {f"{each.name}, {each.shape}": _time_operation(each, rounds) for each in _operations()},
    )


def _time_decoding(model: Any, baseline: Any, prompt: list[int], rounds: int) -> dict[str, Spread]:
    """Times of one text, by what draws it."""
    runs = {
        name: partial(_text, model, prompt, **draw)
        for name, draw in DRAWS.items()
        if draw["method"] != "readout" or model.token_readout is not None
    }
    runs[BASELINE] = partial(_text, baseline, prompt, temperature=1.0)
    for name, run in runs.items():
        assert_parity(run, {f"{name}, reference backend": Baseline(partial(_by_formula, run))})
    return in_turn(runs, rounds)


def _text(model: Any, prompt: list[int], **draw: Any) -> Tensor:
    """`TOKENS` new tokens, whatever they are: no end token ends them."""
    ends, model.config.eos_token_id = model.config.eos_token_id, None
    try:
        return model.generate([prompt], max_new_tokens=TOKENS, seed=SEED, **draw)
    finally:
        model.config.eos_token_id = ends


def _by_formula(run: Callable[[], Tensor]) -> Tensor:
    with use_backend(REFERENCE):
        return run()


def _time_operation(operation: Operation, rounds: int) -> dict[str, Spread]:
    runs = {
        OURS: partial(operation.run, "torch"),
        REFERENCE: partial(operation.run, REFERENCE),
    }
    assert_parity(runs[OURS], {operation.name: Baseline(runs[REFERENCE])})
    return in_turn(runs, rounds)


def _operations() -> Iterator[Operation]:
    """Those whose formula is slow, at sizes of a training step and of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    samples = draw(8, 64, 128).requires_grad_()
    targets, mean, log_std = draw(100, 64, 128), draw(64, 128), draw(64, 128) - 2
    yield Operation(
        "energy_score",
        "N 8, M 100, 64 x 128",
        lambda backend: _with_gradient(energy_score(samples, targets, backend=backend), samples),
    )
    yield Operation(
        "gaussian_energy_score",
        "N 8, 64 x 128",
        lambda backend: _with_gradient(
            gaussian_energy_score(samples, mean, log_std, backend=backend), samples
        ),
    )
    hidden, weight = draw(64, 256), draw(8192, 256)
    yield Operation(
        "linear_argmax (forward)",
        "64 x 256, V 8192",
        lambda backend: linear_argmax(hidden, weight, backend=backend),
    )


def _with_gradient(score: Tensor, inputs: Tensor) -> Mapping[str, Tensor]:
    """A score and the gradient of its mean."""
    (gradient,) = torch.autograd.grad(score.mean(), inputs)
    return {"score": score.detach(), "gradient": gradient}
