"""The energy head: forward and backward in training, forward alone at decoding.

Training is bf16 autocast over float32 parameters; decoding is bf16 throughout. The published module
repeats the hidden states for every draw. Its noise is drawn beforehand, which favours it. In
decoding most of what is read are weights, so several heads rotate as the buffers do.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.gpu.device_time import num_buffers
from benchmarks.gpu.work import Work, assert_close, cache_bytes
from calm_kernels import EnergyHead
from calm_kernels.noise import Stream, uniform

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]


@dataclass(frozen=True)
class Shape:
    """R chunks, N draws each, width C, noise Z, latent L, D blocks."""

    rows: int = 8192
    num_samples: int = 8
    width: int = 1024
    noise_size: int = 64
    latent_size: int = 128
    num_blocks: int = 4
    is_training: bool = True

    def multiplications(self) -> int:
        """Of the GEMMs: once for what depends on the chunk alone, else for every draw."""
        square = self.width**2
        ends = self.width * (self.noise_size + self.latent_size)
        draw = (5 * self.num_blocks + 1) * square + ends
        return self.rows * (self.num_samples * draw + (self.num_blocks + 1) * square)

    def parameters(self) -> int:
        """Elements of the weights."""
        square = self.width**2
        ends = self.width * (self.noise_size + self.latent_size)
        return (6 * self.num_blocks + 2) * square + ends


DECODE = [
    Shape(rows=1, num_samples=200, is_training=False),
    Shape(rows=16, num_samples=200, is_training=False),
    Shape(rows=16, num_samples=1, is_training=False),
    Shape(rows=1, num_samples=200, width=768, is_training=False),
    Shape(rows=1, num_samples=200, width=2560, is_training=False),
]
QUICK = [Shape(), DECODE[0]]
SHAPES = [Shape(), Shape(width=1536), Shape(width=2560), *DECODE]
TINY = [Shape(3, 2, 16, 4, 4, 1), Shape(4, 2, 16, 4, 4, 2, is_training=False)]

Draw = Callable[[EnergyHead, Tensor], Tensor]


def _heads(shape: Shape, device: str, count: int) -> list[EnergyHead]:
    """Heads with the same parameters: `count` for decoding, one for training."""
    torch.manual_seed(0)
    head = EnergyHead(
        shape.width, shape.latent_size, shape.noise_size, shape.num_blocks, init="scaled"
    ).to(device)
    if shape.is_training:
        return [head]
    head = head.bfloat16().requires_grad_(False)
    return [head, *(copy.deepcopy(head) for _ in range(count - 1))]


def _implementations(shape: Shape, seed: Tensor, compiled: bool) -> Iterator[tuple[str, Draw]]:
    """Names and ways to draw ``[N, R, L]``."""

    def drawing(backend: str, recompute: bool = False) -> Draw:
        return lambda head, hidden: head.sample(
            hidden, num_samples=shape.num_samples, seed=seed, recompute=recompute, backend=backend
        )

    if not compiled:
        yield "triton", drawing("triton")
        if shape.is_training:
            yield "triton, recompute", drawing("triton", recompute=True)
        yield "torch", drawing("torch")
    noise = uniform(
        shape.rows, shape.noise_size, stream=Stream.HEAD, seed=seed, num_draws=shape.num_samples,
        device=seed.device,
    )  # fmt: skip
    noise = (noise - 0.5).to(torch.float32 if shape.is_training else torch.bfloat16)

    def published(head: EnergyHead, hidden: Tensor) -> Tensor:
        return head(hidden, noise, backend="reference")

    yield "published module", published
    if compiled:
        yield "published module, torch.compile", torch.compile(published)


def _run(draw: Draw, head: EnergyHead, hidden: Tensor, upstream: Tensor) -> list[Tensor]:
    """Latents and, in training, the gradients of hidden states and parameters."""
    if not hidden.requires_grad:
        return [draw(head, hidden)]
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        latent = draw(head, hidden)
    return [latent.detach(), *torch.autograd.grad(latent, [hidden, *head.parameters()], upstream)]


def _works(shape: Shape, device: str, compiled: bool) -> Iterator[Work]:
    if compiled:
        torch._dynamo.reset()  # compiled for each shape
    seed = torch.tensor([1, 0], device=device)
    hidden_bytes = (4 if shape.is_training else 2) * shape.rows * shape.width
    parameter_bytes = 2 * shape.parameters()
    count = num_buffers(hidden_bytes + parameter_bytes, cache_bytes(device))
    heads = _heads(shape, device, count)
    options = {"device": device, "dtype": torch.float32 if shape.is_training else torch.bfloat16}
    buffers = [
        torch.randn(shape.rows, shape.width, **options).requires_grad_(shape.is_training)
        for _ in range(count)
    ]
    size = (shape.num_samples, shape.rows, shape.latent_size)
    upstream = torch.randn(size, device=device).bfloat16()
    passes = 3 if shape.is_training else 1
    label = "forward + backward" if shape.is_training else "forward"
    expected: list[Tensor] | None = None
    for name, draw in _implementations(shape, seed, compiled):

        def work(index: int, draw: Draw = draw) -> list[Tensor]:
            return _run(draw, heads[index % len(heads)], buffers[index], upstream)

        expected = expected or work(0)
        assert_close(work(0), expected, 0.1, f"energy head, {name}")
        yield Work(
            "energy_head", label, name, asdict(shape), work, count,
            passes * (parameter_bytes + hidden_bytes) + 2 * upstream.numel(),
            flops=2 * passes * shape.multiplications(),
        )  # fmt: skip


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn: ours and ready baselines, or those that torch.compile makes."""
    for shape in shapes:
        yield from _works(shape, device, compiled)
