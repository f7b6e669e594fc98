"""The cross-entropy of a linear layer with both gradients, against torch's and Liger's."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.energy_score import memory_limit
from benchmarks.gpu.work import Work, assert_close
from calm_kernels import linear_cross_entropy

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
BUFFERS = 2  # a call moves more than any cache holds


@dataclass(frozen=True)
class Shape:
    """R rows of H features against V vocabulary entries."""

    rows: int = 32_768
    vocab_size: int = 128_256
    hidden_size: int = 512

    def traffic(self) -> int:
        """Bytes of inputs and gradients, bf16, and of the labels; logits need no memory."""
        return 4 * self.hidden_size * (self.vocab_size + self.rows) + 8 * self.rows

    def flops(self) -> int:
        """Operations of three GEMMs."""
        return 6 * self.rows * self.vocab_size * self.hidden_size

    def logits_bytes(self) -> int:
        """Of all logits and their float32 copy, as the plain formula keeps them."""
        return 6 * self.rows * self.vocab_size


QUICK = [Shape()]
SHAPES = [*QUICK, Shape(rows=4096), Shape(vocab_size=32_001), Shape(hidden_size=1024)]
TINY = [Shape(6, 40, 8), Shape(3, 40, 8)]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in memory."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _losses(shape: Shape, device: str, compiled: bool) -> Iterator[tuple[str, Loss, bool]]:
    """Name, loss of (hidden, weight, labels), and whether a graph can capture it."""
    has_room = 2 * shape.logits_bytes() < memory_limit(device)
    if compiled:
        if has_room:
            yield "logits in memory, torch.compile", torch.compile(plain, dynamic=False), True
        return
    for backend in ("triton", "torch"):
        yield backend, lambda *inputs, b=backend: linear_cross_entropy(*inputs, backend=b), True
    yield "torch, recomputed", partial(linear_cross_entropy, recompute=True, backend="torch"), True
    if has_room:
        yield "logits in memory", plain, True
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        yield "torch's own, chunked", lambda *i: F.linear_cross_entropy(*i, options=options), False
    if device != "cpu" and _has_liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        # counts valid labels on the host
        yield "Liger", lambda hidden, weight, labels: liger(weight, hidden, labels), False


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    value = loss(hidden, weight, labels)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def _make_inputs(shape: Shape, device: str) -> list[Tensor]:
    hidden = torch.randn(shape.rows, shape.hidden_size, device=device)
    weight = 0.05 * torch.randn(shape.vocab_size, shape.hidden_size, device=device)
    labels = torch.randint(shape.vocab_size, (shape.rows,), device=device)
    return [*(value.bfloat16().requires_grad_() for value in (hidden, weight)), labels]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    buffers = [_make_inputs(shape, device) for _ in range(BUFFERS)]
    losses = list(_losses(shape, device, compiled))
    expected = _step(partial(linear_cross_entropy, backend="torch"), *buffers[0])
    for name, loss, _ in losses:
        assert_close(_step(loss, *buffers[0]), expected, 2e-2, f"linear_cross_entropy, {name}")
    for name, loss, can_capture in losses:
        yield Work(
            "linear_cross_entropy", "forward + gradients", name, asdict(shape),
            lambda index, loss=loss: _step(loss, *buffers[index]), BUFFERS, shape.traffic(),
            shape.flops(), can_capture,
        )  # fmt: skip
    if compiled:
        return
    if not _has_liger():
        yield Work(
            "linear_cross_entropy", "forward + gradients", "Liger", asdict(shape),
            lambda index: None, BUFFERS, shape.traffic(), missing="liger_kernel is not installed",
        )  # fmt: skip
    for backend in ("triton", "torch"):

        @torch.no_grad()
        def forward(index: int, backend: str = backend) -> Tensor:
            return linear_cross_entropy(*buffers[index], backend=backend)

        yield Work(
            "linear_cross_entropy", "forward", backend, asdict(shape), forward, BUFFERS,
            shape.traffic() // 2, shape.flops() // 3,
        )  # fmt: skip


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and ready baselines, or those that torch.compile makes."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
