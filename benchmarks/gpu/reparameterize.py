"""The reparameterization, forward, backward and both, against torch and the published formula."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import reparameterize

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

FLOOR, DROPOUT = 0.5, 0.15


@dataclass(frozen=True)
class Shape:
    """R chunks, L latent dimensions."""

    rows: int = 8192
    width: int = 128


QUICK = [Shape()]
SHAPES = [Shape(), *(Shape(rows=rows) for rows in (2048, 32768, 65536))]
TINY = [Shape(3, 16), Shape(2, 16)]


Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def _draws(seed: Tensor, compiled: bool) -> dict[str, Draw]:
    """Names and ways to draw latents, with their KL divergence, from states ``[R, 2L]``."""
    options = {"kl_floor": FLOOR, "dropout": DROPOUT}

    def ours(backend: str) -> Draw:
        return lambda states: reparameterize(states, **options, seed=seed, backend=backend)

    def published(states: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(states[:, ::2], dtype=torch.float32)
        given = {"latent_noise": noise, "latent_keep": torch.rand_like(noise) >= DROPOUT}
        return reparameterize(states, **options, **given, backend="reference")

    if compiled:
        return {"published formula, torch.compile": torch.compile(published, dynamic=False)}
    return {"triton": ours("triton"), "torch": ours("torch"), "published formula": published}


def _both(draw: Draw, states: Tensor, upstream: Sequence[Tensor]) -> list[Tensor]:
    outputs = draw(states)
    gradient = torch.autograd.grad(outputs, states, upstream)
    return [*(value.detach() for value in outputs), *gradient]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    element = 2 * shape.rows * shape.width  # bytes of one bf16 value for each latent dimension
    count = num_buffers(2 * element, cache_bytes(device))
    buffers = [
        torch.randn(shape.rows, 2 * shape.width, device=device).bfloat16().requires_grad_()
        for _ in range(count)
    ]
    seed = torch.tensor([1, 0], device=device)
    upstream = [
        torch.randn(shape.rows, shape.width, device=device).bfloat16(),
        torch.randn(shape.rows, device=device),
    ]

    def work(label: str, name: str, traffic: int, run: Callable[[int], Any]) -> Work:
        return Work("reparameterize", label, name, asdict(shape), run, count, traffic)

    draws = _draws(seed, compiled)
    if not compiled:
        ours, theirs = (_both(draws[name], buffers[0], upstream) for name in ("triton", "torch"))
        assert_close(ours, theirs, 8e-3, "reparameterize")  # of bf16
    for name, draw in draws.items():

        def forward(index: int, draw: Draw = draw) -> tuple[Tensor, ...]:
            return draw(buffers[index])

        def both(index: int, draw: Draw = draw) -> list[Tensor]:
            return _both(draw, buffers[index], upstream)

        yield work("forward", name, 3 * element, forward)
        yield work("forward + backward", name, 8 * element, both)
    if compiled:
        return
    first_row = torch.zeros((), dtype=torch.int64, device=device)

    def backward(index: int) -> Tensor:
        # The operator itself: autograd would use the stream of the forward, which is not captured.
        return torch.ops.calm_kernels.reparameterize_backward(
            buffers[index].detach(), None, None, seed, first_row, *upstream, FLOOR, DROPOUT
        )

    assert_close([backward(0)], ours[2:], 1e-6, "reparameterize, backward alone")
    yield work("backward", "triton", 5 * element, backward)


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and ready baselines, or those that torch.compile makes."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
