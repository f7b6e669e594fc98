"""Attention of a decode step, against rotation, cache write and torch's attention with a mask."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import decode_attention

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]


@dataclass(frozen=True)
class Shape:
    """B sequences whose cache has `capacity` columns, `filled` of them in use."""

    batch_size: int = 1
    heads: int = 16
    kv_heads: int = 16
    size: int = 64
    capacity: int = 512
    filled: int = 256


QUICK = [Shape(), Shape(batch_size=64)]
SHAPES = [
    *QUICK,
    *(Shape(batch_size=batch, filled=511) for batch in (1, 4, 16, 64)),
    Shape(heads=12, kv_heads=12, capacity=2048, filled=2047),
    Shape(heads=32, kv_heads=8, size=128, capacity=2048, filled=2047),
]
TINY = [Shape(2, 2, 1, 8, 6, 4), Shape(1, 1, 1, 4, 40, 39)]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    place = (shape.batch_size, shape.kv_heads)
    row = 2 * shape.batch_size * shape.kv_heads * shape.size  # bytes of a column of keys
    count = num_buffers(2 * row * shape.capacity, cache_bytes(device))
    caches = [
        torch.randn(2, *place, shape.capacity, shape.size, device=device).bfloat16()
        for _ in range(count)
    ]
    width = (shape.heads + 2 * shape.kv_heads) * shape.size
    rows = torch.randn(shape.batch_size, width, device=device).bfloat16()
    angle = torch.randn(shape.capacity, shape.size // 2, device=device)
    rotations = torch.polar(torch.ones_like(angle), angle)
    lengths = torch.full((shape.batch_size,), shape.filled, device=device)
    arrivals = torch.zeros(shape.batch_size * shape.kv_heads, dtype=torch.int32, device=device)

    def step(keys: Tensor, values: Tensor, backend: str) -> Tensor:
        return decode_attention(
            rows, keys, values, rotations, lengths, arrivals=arrivals, backend=backend
        )

    def attend(index: int, backend: str) -> Tensor:
        return step(*caches[index], backend)

    query = rows[:, : shape.heads * shape.size].unflatten(1, (*place[1:], -1, shape.size))

    def alone(index: int) -> Tensor:
        keys, values = caches[index][:, :, :, : shape.filled]
        return F.scaled_dot_product_attention(query, keys, values)

    def work(name: str, run: Callable[[int], Tensor]) -> Work:
        traffic = 2 * row * shape.filled
        return Work("decode_attention", "step", name, asdict(shape), run, count, traffic)

    if compiled:
        fused = torch.compile(partial(step, backend="torch"), dynamic=False)
        yield work("torch, torch.compile", lambda index: fused(*caches[index]))
        return
    assert_close([attend(0, "triton")], [attend(0, "torch")], 3e-2, "decode_attention")
    for backend in ("triton", "torch"):
        yield work(backend, partial(attend, backend=backend))
    yield work("torch, filled columns alone, without rotation and write", alone)


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and torch's, or what torch.compile makes of the latter."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
