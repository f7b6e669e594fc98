"""``python -m benchmarks.gpu.training_step``: a training step of CALM-M on synthetic tokens.

Forward, backward and fused AdamW under bfloat16 autocast: ours, ours with compiled layers as the
recipes have it, the published algorithm. A row has time, model FLOPs utilisation, peak memory,
kernels launched and waits for the device; one that fails has its error instead, and the others
follow. Written after every row.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.decoding import QUICK as TINY
from benchmarks.gpu.decoding import REFERENCE as CALM_M
from benchmarks.gpu.decoding import Shape as Sizes
from benchmarks.gpu.environment import environment
from benchmarks.gpu.profiling import kernels_of
from benchmarks.gpu.work import write
from benchmarks.models import as_published, autoencoder_config, calm_config
from calm import EnergyTransformer
from calm.flops import PEAK, flops_of
from calm.models.backbone import compile_layers
from calm_kernels import use_backend

__all__ = ["QUICK", "REFERENCE", "Shape", "main", "rows"]

WARMUP, REPEATS = 3, 7


@dataclass(frozen=True)
class Shape:
    """A micro-batch: B sequences of T tokens, N draws of the head."""

    batch_size: int = 4
    block_size: int = 8192
    num_samples: int = 8
    sizes: Sizes = CALM_M


REFERENCE = Shape()
QUICK = Shape(batch_size=2, block_size=32, num_samples=2, sizes=TINY)


class Step:
    """One optimizer step of a model on fixed token ids.

    Args:
        model: in training mode, on its device.
        input_ids: ``[B, T]``.
        backend: of the operations.
        compiled: whether the decoder layers are, as ``torch_compile`` does in training.
    """

    def __init__(
        self, model: EnergyTransformer, input_ids: torch.Tensor, backend: str, *, compiled: bool
    ) -> None:
        self.model, self.input_ids, self.backend = model, input_ids, backend
        if compiled:
            compile_layers(model)
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)
        self.number = 0

    def __call__(self) -> torch.Tensor:
        """Take the step; the loss."""
        device = self.input_ids.device
        self.number += 1
        seed = torch.stack([torch.full((), n, device=device) for n in (0, self.number)])
        with use_backend(self.backend), _autocast(device):
            loss = self.model(input_ids=self.input_ids, labels=self.input_ids, seed=seed).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    is_gpu = device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if is_gpu else nullcontext()


def make_model(shape: Shape, device: str, **options: Any) -> EnergyTransformer:
    """CALM-M with random weights in float32."""
    torch.manual_seed(0)
    autoencoder = autoencoder_config(shape.sizes)
    config = calm_config(
        shape.sizes, ae_config=autoencoder, num_samples=shape.num_samples,
        max_position_embeddings=shape.block_size // shape.sizes.patch_size, **options,
    )  # fmt: skip
    return EnergyTransformer(config).train().to(device)


def _variants(shape: Shape, device: str) -> dict[str, Callable[[], Step]]:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch_size, shape.block_size)
    ids = torch.randint(shape.sizes.vocab_size, size, generator=generator).to(device)

    def ours(compiled: bool) -> Step:
        backend = "auto" if device == "cuda" else "torch"
        return Step(make_model(shape, device), ids, backend, compiled=compiled)

    def published() -> Step:
        model = as_published(make_model(shape, device, targets="sample"))
        return Step(model, ids, "reference", compiled=False)

    return {"ours": lambda: ours(False), "ours, compiled": lambda: ours(True),
            "published": published}  # fmt: skip


def rows(shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    """A row of each variant."""
    for name, make in _variants(shape, device).items():
        try:
            yield {"name": name, **_measured(make(), shape)}
        except Exception as error:  # of a compiler or of the card: the other rows still count
            yield {"name": name, "error": f"{type(error).__name__}: {error}"[:2000]}
        if device == "cuda":
            torch.cuda.empty_cache()


def _measured(step: Step, shape: Shape) -> dict[str, Any]:
    device = step.input_ids.device
    losses = [float(step()) for _ in range(WARMUP)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [_timed(step, device) for _ in range(REPEATS)]
    seconds = statistics.median(times)
    chunks = shape.block_size // shape.sizes.patch_size
    each = flops_of(step.model, chunks).training()
    flops = each * shape.batch_size * shape.block_size
    return {
        "losses": losses,
        "median_ms": 1e3 * seconds,
        "least_ms": 1e3 * min(times),
        "tokens_per_second": shape.batch_size * shape.block_size / seconds,
        "model_flops": flops,
        "mfu": flops / seconds / PEAK,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        **_counted(step, device),
    }


def _timed(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _counted(step: Step, device: torch.device) -> dict[str, Any]:
    """Kernels launched by a step, the longest of them, and waits for the device."""
    if device.type != "cuda":
        return {"waits": None, **kernels_of(step, device.type)}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return {
        "waits": sum("synchroniz" in str(wait.message) for wait in waits),
        **kernels_of(step, device.type),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a row failed."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    shape = QUICK if arguments.tiny else REFERENCE
    results: dict[str, Any] = {"environment": environment(device), "shape": asdict(shape)}
    results["rows"] = []
    for row in rows(shape, device):
        results["rows"].append(row)
        print(json.dumps({**row, "longest_kernels": None}), flush=True)
        write(arguments.output / "training-step.json", results)
    return int(any("error" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
