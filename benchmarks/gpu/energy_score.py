"""The energy score, forward and gradient of the samples, against what plain PyTorch offers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import energy_score, gaussian_energy_score

__all__ = ["QUICK", "SHAPES", "SWEEPS", "TINY", "Shape", "works"]

ANALYTIC, GIVEN = "gaussian, forward + gradient", "given targets, forward + gradient"
Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """R chunks, N samples, M targets, L dimensions.

    The posterior's log_std has the standard deviation `spread`; where it is large, the kernel uses
    quadrature in place of the series.
    """

    rows: int = 8192
    num_samples: int = 8
    num_targets: int = 100
    width: int = 128
    spread: float = 0.2

    def traffic(self) -> int:
        """Bytes that must move: samples in, gradient out, mean and log_std in, bf16."""
        return 2 * self.rows * self.width * (2 * self.num_samples + 2)

    def given_traffic(self) -> int:
        """With targets given instead of mean and log_std."""
        return 2 * self.rows * self.width * (2 * self.num_samples + self.num_targets)

    def eager_bytes(self) -> int:
        """The published formula's [N, M, R, L] array in fp32."""
        return 4 * self.num_samples * self.num_targets * self.rows * self.width


REFERENCE = Shape()
SWEEPS = {
    "rows": [Shape(rows=rows) for rows in (512, 2048, 8192, 32768)],
    "num_samples": [Shape(num_samples=n) for n in (2, 4, 8, 16)],
    "num_targets": [Shape(num_targets=m) for m in (16, 50, 100, 400)],
    "width": [Shape(width=w) for w in (32, 64, 128, 256, 512, 1024)],
}
QUICK = [REFERENCE, Shape(spread=1.5)]
SHAPES = QUICK + sorted({s for sweep in SWEEPS.values() for s in sweep} - {REFERENCE}, key=str)
TINY = [Shape(3, 2, 4, 64), Shape(2, 3, 4, 32, 1.5)]


def make_inputs(shape: Shape, seed: int, device: str) -> list[Tensor]:
    """Samples in chunk-major memory, mean, log_std, bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    mean = torch.randn(shape.rows, shape.width, **options)
    log_std = -1.2 + shape.spread * torch.randn(shape.rows, shape.width, **options)
    noise = torch.randn(shape.rows, shape.num_samples, shape.width, **options)
    samples = (mean[:, None] + 0.4 * noise).bfloat16().transpose(0, 1).requires_grad_()
    return [samples, mean.bfloat16(), log_std.bfloat16()]


def cdist_score(samples: Tensor, targets: Tensor) -> Tensor:
    """The fastest plain PyTorch: torch.cdist in float32, chunks as the batch."""
    points = samples.transpose(0, 1).float()
    pairs = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    n = points.shape[1]
    near = torch.cdist(points, targets.transpose(0, 1).float()).mean((1, 2))
    return pairs.sum((1, 2)) / (n * (n - 1)) - 2 * near


def _ours(shape: Shape, backend: str, targets: str, seed: Tensor) -> Score:
    return lambda *inputs: gaussian_energy_score(
        *inputs, targets=targets, num_targets=shape.num_targets, seed=seed, backend=backend
    )


def _scores(shape: Shape, device: str, compiled: bool) -> Iterator[tuple[str, Score, bool]]:
    """Name, score of (samples, mean, log_std), and whether a graph can capture it."""
    seed = torch.tensor([1, 0], device=device)

    def noise() -> Tensor:
        return torch.randn(shape.num_targets, shape.rows, shape.width, device=device)

    def by_cdist(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return cdist_score(samples, mean + log_std.exp() * noise())

    def published(*inputs: Tensor) -> Tensor:
        return gaussian_energy_score(*inputs, target_noise=noise(), backend="reference")

    has_room = 3 * shape.eager_bytes() < memory_limit(device)
    if compiled:
        if has_room:
            fused = torch.compile(published, dynamic=False)
            yield "published formula, torch.compile", fused, True
        return
    for targets in ("analytic", "antithetic", "sample"):
        yield f"triton, {targets}", _ours(shape, "triton", targets, seed), True
    # waits for the device to know which chunks need quadrature
    yield "torch, analytic", _ours(shape, "torch", "analytic", seed), False
    yield "torch.cdist", by_cdist, True
    if has_room:
        yield "published formula", published, True


def memory_limit(device: str) -> int:
    """Half of the device's memory for a baseline's intermediates."""
    return (
        1 << 30 if device == "cpu" else torch.cuda.get_device_properties(device).total_memory // 2
    )


def _gradient(score: Score, inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    value = score(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs[0], upstream)


def _assert_parity(shape: Shape, inputs: Sequence[Tensor], upstream: Tensor) -> None:
    """The kernels agree with the torch backend on these inputs, value and gradient."""
    seed = torch.tensor([3, 0], device=upstream.device)
    for targets in ("analytic", "antithetic", "sample"):
        results = [
            _gradient(_ours(shape, backend, targets, seed), inputs, upstream)
            for backend in ("triton", "torch")
        ]
        assert_close(*results, 8e-3, targets)


def _gaussian_works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    if compiled:
        torch._dynamo.reset()  # compiled for each shape
    count = num_buffers(shape.traffic() // 2, cache_bytes(device))
    buffers = [make_inputs(shape, seed, device) for seed in range(count)]
    upstream = torch.full((shape.rows,), 1 / shape.rows, device=device)
    if not compiled:
        _assert_parity(shape, buffers[0], upstream)
    for name, score, can_capture in _scores(shape, device, compiled):
        yield Work(
            operation="energy_score",
            label=ANALYTIC,
            name=name,
            shape=asdict(shape),
            run=lambda index, score=score: _gradient(score, buffers[index], upstream),
            buffers=count,
            traffic=shape.traffic(),
            can_capture=can_capture,
        )


def _given_works(shape: Shape, device: str) -> Iterator[Work]:
    count = num_buffers(shape.given_traffic() // 2, cache_bytes(device))
    upstream = torch.full((shape.rows,), 1 / shape.rows, device=device)
    buffers = []
    for seed in range(count):
        samples, mean, log_std = make_inputs(shape, seed, device)
        draws = torch.randn(shape.num_targets, *mean.shape, device=device).to(mean.dtype)
        buffers.append((samples, mean + log_std.exp() * draws))
    scores: dict[str, Score] = {
        backend: lambda *points, backend=backend: energy_score(*points, backend=backend)
        for backend in ("triton", "torch")
    }
    equal = torch.full((shape.num_targets, shape.rows), 1 / shape.num_targets, device=device)
    scores["triton, with weights"] = lambda *points: energy_score(
        *points, target_weights=equal, backend="triton"
    )
    scores["torch.cdist"] = cdist_score
    results = [_gradient(score, buffers[0], upstream) for score in scores.values()]
    for other in results[1:]:
        assert_close(results[0], other, 1e-2, "given targets")
    for name, score in scores.items():
        yield Work(
            operation="energy_score",
            label=GIVEN,
            name=name,
            shape=asdict(shape),
            run=lambda index, score=score: _gradient(score, buffers[index], upstream),
            buffers=count,
            traffic=shape.given_traffic(),
        )


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Gaussian targets at every shape; given targets where they need no more memory than usual.
    Ours and ready baselines, or those that torch.compile makes.
    """
    for shape in shapes:
        is_small = shape.given_traffic() <= REFERENCE.given_traffic()
        if is_small and shape.spread == REFERENCE.spread and not compiled:
            yield from _given_works(shape, device)
        yield from _gaussian_works(shape, device, compiled)
