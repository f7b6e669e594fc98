"""Layers of a decode step for few rows, against the library's norm, matmuls and additions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import linear_residual, norm_linear, norm_swiglu

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """R rows of H features; an MLP is `inner` wide."""

    rows: int = 1
    width: int = 1024
    inner: int = 2752


QUICK = [Shape(), Shape(rows=64)]
SHAPES = [*(Shape(rows=rows) for rows in (1, 4, 16, 64)), Shape(1, 768, 2048), Shape(64, 768, 2048)]
TINY = [Shape(2, 16, 24), Shape(17, 24, 16)]

Layer = Callable[..., Tensor]


def _layers(
    shape: Shape, device: str, count: int
) -> Iterator[tuple[str, Layer, list[tuple[Tensor, ...]]]]:
    """Label, the layer as a function of its weights and a backend, and `count` sets of weights."""

    def draw(*sizes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        return [
            tuple((size[1] ** -0.5 * torch.randn(size, device=device)).bfloat16() for size in sizes)
            for _ in range(count)
        ]

    width, inner = shape.width, shape.inner
    rows = torch.randn(shape.rows, width, device=device).bfloat16()
    features = torch.randn(shape.rows, inner, device=device).bfloat16()
    factor = torch.ones(width, device=device).bfloat16()

    def attention(*weights: Tensor, backend: str) -> Tensor:
        return norm_linear(rows, factor, weights, norm_eps=EPS, backend=backend)

    def output(weight: Tensor, *, backend: str) -> Tensor:
        return linear_residual(rows, weight, rows, backend=backend)

    def mlp(gate: Tensor, up: Tensor, *, backend: str) -> Tensor:
        return norm_swiglu(rows, factor, gate, up, norm_eps=EPS, backend=backend)

    def down(weight: Tensor, *, backend: str) -> Tensor:
        return linear_residual(features, weight, rows, backend=backend)

    yield "norm, query, key, value", attention, draw(*[(width, width)] * 3)
    yield "output, residual", output, draw((width, width))
    yield "norm, gate, up, SwiGLU", mlp, draw((inner, width), (inner, width))
    yield "down, residual", down, draw((width, inner))


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    count = num_buffers(2 * shape.width * shape.width, cache_bytes(device))
    for label, layer, weights in _layers(shape, device, count):
        ours, theirs = (partial(layer, backend=backend) for backend in ("triton", "torch"))
        named: dict[str, Layer] = {"triton": ours, "torch": theirs}
        if compiled:
            named = {"torch, torch.compile": torch.compile(theirs, dynamic=False)}
        else:
            assert_close([ours(*weights[0])], [theirs(*weights[0])], 3e-2, label)
        elements = sum(weight.numel() for weight in weights[0])
        for name, function in named.items():

            def run(
                index: int, function: Layer = function, sets: list[tuple[Tensor, ...]] = weights
            ) -> Tensor:
                return function(*sets[index])

            yield Work(
                "norm_linear", label, name, asdict(shape), run, count, 2 * elements,
                2 * elements * shape.rows,
            )  # fmt: skip


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and torch's, or what torch.compile makes of the latter."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
