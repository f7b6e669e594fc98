"""``python -m benchmarks.gpu.run``: kernels against their rivals on this GPU.

Parity is asserted before anything is timed. Results go to benchmarks/results/<device>.json with
versions and commit, and are drawn as plots beside it.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from benchmarks.gpu.device_time import measure, rotating
from benchmarks.gpu.plots import draw
from calm_kernels import gaussian_energy_score, reparameterize
from calm_kernels.compiling.targets import TARGETS
from calm_kernels.tuning import architecture

RESULTS = Path(__file__).resolve().parents[1] / "results"
EAGER_MEMORY_LIMIT = 16 << 30


@dataclass(frozen=True)
class Shape:
    """R patches, N samples, M targets, L dimensions."""

    rows: int = 8192
    num_samples: int = 8
    num_targets: int = 100
    width: int = 128

    def traffic(self) -> int:
        """Bytes that must move: samples in, gradient out, mean and log_std in, bf16."""
        return 2 * self.rows * self.width * (2 * self.num_samples + 2)

    def eager_bytes(self) -> int:
        """The published formula's [N, M, R, L] array in fp32."""
        return 4 * self.num_samples * self.num_targets * self.rows * self.width


REFERENCE = Shape()
SWEEPS = {
    "rows": [Shape(rows=rows) for rows in (512, 2048, 8192, 32768)],
    "num_samples": [Shape(num_samples=n) for n in (2, 4, 8, 16)],
    "num_targets": [Shape(num_targets=m) for m in (16, 50, 100, 400)],
    "width": [Shape(width=w) for w in (32, 64, 128, 256)],
}


def make_inputs(shape: Shape, seed: int) -> list[torch.Tensor]:
    """bf16 samples in patch-major memory, mean, log_std."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    mean = torch.randn(shape.rows, shape.width, **options)
    log_std = -1.2 + 0.2 * torch.randn(shape.rows, shape.width, **options)
    noise = torch.randn(shape.rows, shape.num_samples, shape.width, **options)
    samples = (mean[:, None] + 0.4 * noise).bfloat16().transpose(0, 1).requires_grad_()
    return [samples, mean.bfloat16(), log_std.bfloat16()]


def cdist_score(
    samples: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, count: int,
) -> torch.Tensor:  # fmt: skip
    """The strongest plain rival: torch.cdist, patches as the batch, targets drawn anew."""
    draws = torch.randn(mean.shape[0], count, mean.shape[1], device=mean.device)
    targets = mean[:, None].float() + log_std[:, None].float().exp() * draws
    points = samples.transpose(0, 1).float()
    pairs = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    n = points.shape[1]
    return pairs.sum((1, 2)) / (n * (n - 1)) - 2 * torch.cdist(points, targets).mean((1, 2))


def energy_works(shape: Shape) -> Iterator[tuple[str, Callable[..., torch.Tensor], bool]]:
    """Name, score of (samples, mean, log_std), and whether a graph can capture it with its
    gradient.
    """
    seed = torch.tensor([1, 0], device="cuda")
    options = {"num_targets": shape.num_targets, "seed": seed}

    def score(backend: str, targets: str) -> Callable[..., torch.Tensor]:
        return lambda *inputs: gaussian_energy_score(
            *inputs, targets=targets, backend=backend, **options
        )

    for targets in ("analytic", "antithetic", "sample"):
        yield f"triton, {targets}", score("triton", targets), True
    yield "torch, analytic", score("torch", "analytic"), False
    yield "torch.cdist", lambda *inputs: cdist_score(*inputs, shape.num_targets), False
    if 3 * shape.eager_bytes() < EAGER_MEMORY_LIMIT:
        yield "published formula", score("reference", "sample"), False
        yield "published formula, torch.compile", torch.compile(score("reference", "sample")), False


def assert_parity(shape: Shape) -> None:
    """The kernels agree with the torch backend on these inputs, value and gradient."""
    samples, mean, log_std = make_inputs(shape, 0)
    for targets in ("analytic", "antithetic", "sample"):
        results = []
        for backend in ("triton", "torch"):
            score = gaussian_energy_score(
                samples, mean, log_std, targets=targets, num_targets=shape.num_targets, seed=3,
                backend=backend,
            )  # fmt: skip
            results.append((score, *torch.autograd.grad(score.mean(), samples)))
        for ours, theirs in zip(*results, strict=True):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 5e-3, f"{targets}: relative error {error:.1e}; nothing is timed"


def energy_rows(shape: Shape) -> Iterator[dict]:
    """One row per implementation: forward and gradient of the samples."""
    torch._dynamo.reset()  # the compiled rival is compiled for each shape
    assert_parity(shape)
    buffers = rotating(lambda seed: make_inputs(shape, seed), shape.traffic() // 2)
    target = TARGETS.get(architecture(torch.device("cuda")))
    for name, score, can_capture in energy_works(shape):

        def work(index: int, score: Callable[..., torch.Tensor] = score) -> object:
            inputs = buffers[index]
            return torch.autograd.grad(score(*inputs).mean(), inputs[0])

        found = measure(work, len(buffers), can_capture=can_capture)
        floor = shape.traffic() / target.bandwidth * 1e3 if target else None
        yield {
            "work": "energy score, forward + gradient",
            "name": name,
            "shape": asdict(shape),
            **asdict(found),
            "gigabytes_per_second": shape.traffic() / found.median_ms / 1e6,
            "share_of_floor": floor / found.median_ms if floor else None,
        }


def reparameterize_rows() -> Iterator[dict]:
    """Forward alone, and forward with backward, 8192 x 128."""
    shape = {"rows": 8192, "width": 128}
    buffers = rotating(
        lambda seed: [torch.randn(8192, 256, device="cuda").bfloat16().requires_grad_()], 4 << 20
    )
    seed = torch.tensor([1, 0], device="cuda")
    for backend in ("triton", "torch"):

        def forward(index: int, backend: str = backend) -> tuple[torch.Tensor, torch.Tensor]:
            return reparameterize(
                buffers[index][0], kl_floor=0.5, dropout=0.15, seed=seed, backend=backend
            )

        def both(index: int) -> object:
            latent, kl = forward(index)
            return torch.autograd.grad((latent, kl), buffers[index], (latent, kl))

        for work, run in (("forward", forward), ("forward + backward", both)):
            found = measure(run, len(buffers), can_capture=backend == "triton")
            label = {"work": f"reparameterize, {work}", "name": backend, "shape": shape}
            yield label | asdict(found)


def environment() -> dict:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "architecture": architecture(torch.device("cuda")),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": commit,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the reference shape alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: benchmarks.gpu needs a GPU; `make bench` runs on the CPU", file=sys.stderr)
        return 2
    shapes = [REFERENCE] if arguments.quick else sorted(
        {shape for sweep in SWEEPS.values() for shape in sweep}, key=str
    )  # fmt: skip
    rows = list(reparameterize_rows())
    for shape in shapes:
        for row in energy_rows(shape):
            rows.append(row)
            print(f"{row['name']:<34} {shape} {row['median_ms']:.4f} ms", flush=True)
    results = {"environment": environment(), "rows": rows}
    name = results["environment"]["device"].lower().replace(" ", "-")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not arguments.quick:
        draw(results, path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
