"""Seeds of sequences, chunks and waves of draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm.errors import UserError
from calm_kernels.noise import Seed, Stream, as_seed, philox

__all__ = ["OFFSET_STRIDE", "advance", "row_seeds", "sequence_seeds"]

LOW_32_BITS = 0xFFFFFFFF
# Between the seeds of draws that share nothing: waves of one chunk, depths of a rollout, draws of a
# branch, and what a training step draws beside its samples. The offsets in between are free: no
# text has so many chunks and no run so many steps.
OFFSET_STRIDE = 2**40


def sequence_seeds(seed: Seed | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """One seed for each sequence, int64 ``[B, 2]`` of (seed, offset).

    A list holds one for each sequence. A single seed is that of row 0; row b > 0 gets 64 bits of
    Philox with the seed as key and b as counter, so that neighbouring seeds share no stream.

    Args:
        seed: see `calm_kernels.noise.as_seed`, or a list of B ints.
        batch: B.
        device: where draws are made.
    """
    if isinstance(seed, Sequence):
        if len(seed) != batch:
            raise UserError(f"seed must hold one number per sequence, {batch}; got {len(seed)}")
        for number in seed:
            if type(number) is not int or not -(2**63) <= number < 2**63:
                raise UserError(f"seed must hold whole numbers of 64 bits, got {number!r}")
        return as_seed(torch.tensor(seed, dtype=torch.int64)[:, None], device)
    common = as_seed(seed, device)
    if common.dim() == 2:
        if len(common) != batch:
            raise UserError(f"seed must hold one row per sequence, {batch}; got {len(common)}")
        return common
    if batch == 1:
        return common[None]
    value, offset = common.expand(batch, 2).unbind(1)
    row = torch.arange(batch, device=device)
    own = _hashed(value, Stream.SEQUENCE, row, torch.zeros_like(row))
    return torch.stack([torch.where(row == 0, value, own), offset], dim=1)


def advance(seed: Tensor, steps: int | Tensor) -> Tensor:
    """The seed with its offset moved on by `steps`, for other draws."""
    offset = seed[..., 1] + steps
    return torch.stack([seed[..., 0].expand_as(offset), offset], dim=-1)


def row_seeds(seed: Tensor, rows: Tensor, stream: Stream) -> Tensor:
    """A seed for each row of a step, whose offsets are all free.

    It is 64 bits of Philox with the seed as key, and row and offset as counter: no step of a run
    shares draws with another, whatever offsets its rows then draw at.

    Args:
        seed: int64 ``[2]`` of (seed, offset).
        rows: int64 ``[...]``, indices of any range.
        stream: what the rows are for.

    Returns: int64 ``[..., 2]`` of (seed, 0).
    """
    value, offset = seed.unbind()
    own = _hashed(value, stream, rows, offset)
    return torch.stack([own, torch.zeros_like(own)], dim=-1)


def _hashed(seed: Tensor, stream: Stream, row: Tensor, offset: Tensor) -> Tensor:
    """64 bits of Philox: `seed` and `stream` are the key, `row` and `offset` the counter.

    All int64 of shapes that broadcast; of a row its lower 32 bits count.
    """
    key = (seed & LOW_32_BITS, ((seed >> 32) & LOW_32_BITS) ^ int(stream))
    below, above = offset & LOW_32_BITS, (offset >> 32) & LOW_32_BITS
    low, high, *_ = philox((row & LOW_32_BITS, below, above, torch.zeros_like(row)), key)
    return low | (high << 32)
