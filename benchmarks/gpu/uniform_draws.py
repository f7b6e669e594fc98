"""Addressed draws, uniform and normal, against plain PyTorch's Philox and its own generator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.work import Work, assert_close
from calm_kernels import normal_draws, uniform_draws
from calm_kernels.noise import Stream

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

SEEDS = 2  # buffers; the inputs fit into registers


@dataclass(frozen=True)
class Shape:
    """R rows, N draws of each, W elements."""

    rows: int = 1
    draws: int = 1
    width: int = 1


QUICK = [Shape(), Shape(8192, 8, 128)]
SHAPES = [*QUICK, Shape(64, 1, 1), Shape(64, 200, 4), Shape(8192, 1, 128)]
TINY = [Shape(1, 1, 1), Shape(3, 2, 9)]

Draw = Callable[[int], Tensor]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    seeds = torch.tensor([[1, 0], [2, 5]], device=device)
    sizes = (shape.draws, shape.rows, shape.width)
    address = {"stream": Stream.HEAD, "num_draws": shape.draws, "device": device}

    def uniform(index: int, backend: str) -> Tensor:
        seed = seeds[index]
        return uniform_draws(shape.rows, shape.width, seed=seed, backend=backend, **address)

    def normal(index: int, backend: str) -> Tensor:
        seed = seeds[index]
        return normal_draws(shape.rows, shape.width, seed=seed, backend=backend, **address)

    for draw, plain in ((uniform, torch.rand), (normal, torch.randn)):
        ours, theirs = (partial(draw, backend=backend) for backend in ("triton", "torch"))
        named: dict[str, Draw] = {
            "triton": ours, "torch": theirs,
            "torch's generator, not addressed": lambda _, plain=plain: plain(sizes, device=device),
        }  # fmt: skip
        if compiled:
            named = {"torch, torch.compile": torch.compile(theirs, dynamic=False)}
        else:
            assert_close([ours(1)], [theirs(1)], 1e-5, draw.__name__)
        traffic = 4 * shape.rows * shape.draws * shape.width
        for name, run in named.items():
            yield Work("uniform_draws", draw.__name__, name, asdict(shape), run, SEEDS, traffic)


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours, torch's, or what torch.compile makes of the latter."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
