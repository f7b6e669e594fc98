"""The reparameterization, forward, backward and both, against the torch backend."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import reparameterize

__all__ = ["QUICK", "SHAPES", "Shape", "works"]

FLOOR, DROPOUT = 0.5, 0.15


@dataclass(frozen=True)
class Shape:
    """R chunks, L latent dimensions."""

    rows: int = 8192
    width: int = 128


QUICK = [Shape()]
SHAPES = [Shape(), Shape(rows=65536)]


def _both(states: Tensor, upstream: Sequence[Tensor], seed: Tensor, backend: str) -> list[Tensor]:
    outputs = reparameterize(states, kl_floor=FLOOR, dropout=DROPOUT, seed=seed, backend=backend)
    gradient = torch.autograd.grad(outputs, states, upstream)
    return [*(value.detach() for value in outputs), *gradient]


def _works(shape: Shape, device: str) -> Iterator[Work]:
    element = 2 * shape.rows * shape.width  # bytes of one bf16 value for each latent dimension
    count = num_buffers(2 * element, cache_bytes(device))
    buffers = [
        torch.randn(shape.rows, 2 * shape.width, device=device).bfloat16().requires_grad_()
        for _ in range(count)
    ]
    seed, first_row = torch.tensor([1, 0], device=device), torch.zeros((), dtype=torch.int64)
    first_row = first_row.to(device)
    upstream = [
        torch.randn(shape.rows, shape.width, device=device).bfloat16(),
        torch.randn(shape.rows, device=device),
    ]
    ours, theirs = (_both(buffers[0], upstream, seed, name) for name in ("triton", "torch"))
    assert_close(ours, theirs, 8e-3, "reparameterize")  # of bf16

    def work(label: str, name: str, traffic: int, run: object) -> Work:
        return Work("reparameterize", label, name, asdict(shape), run, count, traffic)

    for backend in ("triton", "torch"):

        def forward(index: int, backend: str = backend) -> tuple[Tensor, ...]:
            return reparameterize(
                buffers[index], kl_floor=FLOOR, dropout=DROPOUT, seed=seed, backend=backend
            )

        def both(index: int, backend: str = backend) -> list[Tensor]:
            return _both(buffers[index], upstream, seed, backend)

        yield work("forward", backend, 3 * element, forward)
        yield work("forward + backward", backend, 8 * element, both)

    def backward(index: int) -> Tensor:
        # The operator itself: autograd would use the stream of the forward, which is not captured.
        return torch.ops.calm_kernels.reparameterize_backward(
            buffers[index].detach(), None, None, seed, first_row, *upstream, FLOOR, DROPOUT
        )

    assert_close([backward(0)], ours[2:], 1e-6, "reparameterize, backward alone")
    yield work("backward", "triton", 5 * element, backward)


def works(shapes: Sequence[Shape], device: str = "cuda") -> Iterator[Work]:
    """Every shape in turn."""
    for shape in shapes:
        yield from _works(shape, device)
