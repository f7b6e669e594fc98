"""Tokens drawn from logits: ours, plain PyTorch's, and the softmax that comes before any draw."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, cache_bytes
from calm_kernels import softmax_draws

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

SAME = 0.99  # share of tokens that both draw; at the others a sum is rounded another way


@dataclass(frozen=True)
class Shape:
    """R sequences, N draws of each, V tokens."""

    rows: int = 1
    draws: int = 1
    vocab_size: int = 128_256


QUICK = [Shape(), Shape(64)]
SHAPES = [*QUICK, Shape(16), Shape(1, 200), Shape(800)]
TINY = [Shape(1, 1, 40), Shape(3, 2, 1100)]

Draw = Callable[[int], Tensor]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    traffic = 2 * shape.rows * shape.vocab_size
    sizes = (num_buffers(traffic, cache_bytes(device)), shape.rows, shape.vocab_size)
    logits = torch.randn(sizes, device=device, dtype=torch.bfloat16)
    seed = torch.tensor([1, 0], device=device)

    def draw(index: int, backend: str) -> Tensor:
        options = {"num_draws": shape.draws, "seed": seed, "temperature": 0.8}
        return softmax_draws(logits[index], **options, backend=backend)[0]

    def softmax(index: int) -> Tensor:
        return (logits[index].float() / 0.8).softmax(-1)

    ours, theirs = (partial(draw, backend=backend) for backend in ("triton", "torch"))
    named: dict[str, Draw] = {"triton": ours, "torch": theirs, "torch, softmax alone": softmax}
    if compiled:
        named = {"torch, torch.compile": torch.compile(theirs, dynamic=False)}
    else:
        share = (ours(1) == theirs(1)).double().mean().item()
        assert share >= SAME, f"softmax_draws: {share:.3f} of the tokens agree; nothing is timed"
    for name, run in named.items():
        yield Work("softmax_draws", "draw", name, asdict(shape), run, len(logits), traffic)


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and torch's, or what torch.compile makes of the latter."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
