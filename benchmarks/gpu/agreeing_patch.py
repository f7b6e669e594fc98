"""A vote among drawn chunks, against the torch backend and the published loop over sequences."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.gpu.work import Work
from calm_kernels import agreeing_patch

__all__ = ["QUICK", "SHAPES", "TINY", "Shape", "works"]

# In decoding the candidates have just been written and are in the cache: few buffers are enough.
BUFFERS = 20
BASELINES = {"torch": "torch", "reference": "published loop"}


@dataclass(frozen=True)
class Shape:
    """B sequences of N candidates of K tokens, each token one of `distinct`."""

    batch: int = 1
    num_candidates: int = 200
    patch_size: int = 4
    distinct: int = 4

    def traffic(self) -> int:
        """Bytes of the candidates and of the choice."""
        return 8 * self.batch * (self.num_candidates + 1) * self.patch_size


QUICK = [Shape(), Shape(batch=64)]
SHAPES = [
    *QUICK,
    Shape(distinct=1),
    Shape(distinct=60),
    Shape(batch=16),
    Shape(num_candidates=1024),
    Shape(num_candidates=8192),
]
TINY = [Shape(3, 9, 2, 2), Shape(2, 9, 2, 2)]


def _works(shape: Shape, device: str) -> Iterator[Work]:
    size = (shape.batch, shape.num_candidates, shape.patch_size)
    buffers = [torch.randint(shape.distinct, size, device=device) for _ in range(BUFFERS)]
    seed, power = torch.tensor([1, 0], device=device), torch.full((), 2.0, device=device)

    def vote(index: int, backend: str) -> tuple[Tensor, ...]:
        return agreeing_patch(buffers[index], power, seed=seed, backend=backend)

    for ours, theirs in zip(vote(0, "triton"), vote(0, "reference"), strict=True):
        assert torch.equal(ours, theirs), "agreeing_patch: other choices; nothing is timed"
    for backend, name in {"triton": "triton", **BASELINES}.items():
        yield Work(
            "agreeing_patch", "vote", name, asdict(shape),
            lambda index, backend=backend: vote(index, backend), BUFFERS, shape.traffic(),
            can_capture=backend != "reference",
        )  # fmt: skip


def works(
    shapes: Sequence[Shape], device: str = "cuda", *, compiled: bool = False
) -> Iterator[Work]:
    """Every shape in turn. The published loop runs on the host: there is nothing to compile."""
    for shape in () if compiled else shapes:
        yield from _works(shape, device)
