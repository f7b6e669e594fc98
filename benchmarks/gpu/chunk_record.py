"""The record of a chunk, and the state that moves on, against plain PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.work import Work, assert_close
from calm_kernels import advance_state, chunk_record

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

BUFFERS = 2  # the inputs are what the kernel before has just written


@dataclass(frozen=True)
class Shape:
    """B sequences, N draws of L numbers, K tokens."""

    batch_size: int = 1
    draws: int = 1
    latent_size: int = 128
    patch_size: int = 4


QUICK = [Shape(), Shape(draws=200)]
SHAPES = [*QUICK, Shape(64), Shape(64, 200)]
TINY = [Shape(1, 1, 4, 2), Shape(2, 3, 5, 2)]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    tokens = torch.randint(1000, (BUFFERS, shape.batch_size, shape.patch_size), device=device)
    sizes = (BUFFERS, shape.batch_size, shape.draws, shape.latent_size)
    values = torch.randn(sizes, device=device).bfloat16().transpose(1, 2)

    def record(index: int, backend: str) -> Tensor:
        return chunk_record(tokens[index], values[index], draws=shape.draws, backend=backend)

    def finiteness(index: int) -> Tensor:
        return torch.isfinite(values[index]).all(-1).all(0)

    ours, theirs = (partial(record, backend=backend) for backend in ("triton", "torch"))
    named: dict[str, Callable[[int], Tensor]] = {
        "triton": ours, "torch": theirs, "torch, finiteness alone": finiteness,
    }  # fmt: skip
    if compiled:
        named = {"torch, torch.compile": torch.compile(theirs, dynamic=False)}
    else:
        assert_close([ours(1)], [theirs(1)], 1e-12, "chunk_record")
    traffic = 2 * values[0].numel() + 8 * tokens[0].numel() * 2
    for name, run in named.items():
        yield Work("chunk_record", "record", name, asdict(shape), run, BUFFERS, traffic)
    yield from _advances(shape, device, compiled)


def _advances(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    sizes = (shape.patch_size + 5, shape.patch_size, 2)
    record, *state = (
        torch.randint(1000, (shape.batch_size, size), device=device) for size in sizes
    )
    state.append(torch.zeros_like(record[:, 0]))
    copies = {name: [each.clone() for each in state] for name in ("triton", "torch")}

    def advance(index: int, backend: str) -> list[Tensor]:
        advance_state(record, *copies[backend], backend=backend)
        return copies[backend]

    named = {name: partial(advance, backend=name) for name in copies}
    if compiled:
        named = {"torch, torch.compile": torch.compile(named["torch"], dynamic=False)}
    else:
        for run in named.values():
            run(0)
        assert_close(*copies.values(), 1e-12, "advance_state")
    traffic = 8 * shape.batch_size * (2 * shape.patch_size + 4)
    for name, run in named.items():
        yield Work("chunk_record", "advance", name, asdict(shape), run, BUFFERS, traffic)


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and torch's, or what torch.compile makes of the latter."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
