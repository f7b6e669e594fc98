"""The likeliest token of each row, against logits in memory.

The rival of the kernels is the torch backend: the library's matmul into float32, block of tokens by
block of tokens, each with an argmax of its own. It is also what wide rows take, see
`calm_kernels.tuning.Launch.fused_width`, whose value the widest shape is for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, cache_bytes
from calm_kernels import linear_argmax

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]


@dataclass(frozen=True)
class Shape:
    """R rows of H features against V vocabulary entries."""

    rows: int = 800
    vocab_size: int = 128_256
    hidden_size: int = 512

    def traffic(self) -> int:
        """Bytes of the weight, the rows and the indices, bf16."""
        return 2 * self.hidden_size * (self.vocab_size + self.rows) + 8 * self.rows

    def flops(self) -> int:
        return 2 * self.rows * self.vocab_size * self.hidden_size


QUICK = [Shape(), Shape(rows=4)]
SHAPES = [
    *QUICK, Shape(rows=16), Shape(rows=64), Shape(rows=12_800), Shape(vocab_size=32_001),
    Shape(hidden_size=4096),
]  # fmt: skip
TINY = [Shape(5, 40, 8), Shape(2, 40, 8)]


def logits_in_memory(hidden: Tensor, weight: Tensor) -> Tensor:
    """What the published code does."""
    return (hidden @ weight.T).argmax(dim=-1)


def _ours(backend: str, **options: bool) -> Callable[..., Tensor]:
    return lambda hidden, weight: linear_argmax(hidden, weight, backend=backend, **options)


def _assert_parity(hidden: Tensor, weight: Tensor) -> None:
    """The chosen logit is the largest, up to rounding."""
    index, largest = linear_argmax(hidden, weight, return_max=True, backend="triton")
    wanted = linear_argmax(hidden, weight, return_max=True, backend="torch")[1]
    torch.testing.assert_close(largest, wanted, rtol=1e-5, atol=1e-5)
    chosen = (hidden.float() * weight[index].float()).sum(-1)
    torch.testing.assert_close(chosen, wanted, rtol=1e-4, atol=1e-4)


def _runs(compiled: bool) -> dict[str, Callable[..., Any]]:
    if compiled:
        run = torch.compile(logits_in_memory, dynamic=False)
        return {"logits in memory, torch.compile": run}
    return {
        "triton": _ours("triton"),
        "triton, with log-sum-exp": _ours("triton", return_logsumexp=True),
        "torch": _ours("torch"),
        "logits in memory": logits_in_memory,
    }


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    count = num_buffers(shape.traffic(), cache_bytes(device))
    buffers = [
        [
            torch.randn(size, shape.hidden_size, device=device).bfloat16()
            for size in (shape.rows, shape.vocab_size)
        ]
        for _ in range(count)
    ]
    if not compiled:
        _assert_parity(*buffers[0])
    for name, run in _runs(compiled).items():
        yield Work(
            "linear_argmax", "forward", name, asdict(shape),
            lambda index, run=run: run(*buffers[index]), count, shape.traffic(), shape.flops(),
        )  # fmt: skip


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and ready baselines, or those that torch.compile makes."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
