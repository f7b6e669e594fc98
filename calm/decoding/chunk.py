"""A chunk of K tokens: as a method chooses it, and as the host reads it.

Shapes: B sequences, K tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Chunk", "ChunkRecord", "read_records"]


class Chunk(NamedTuple):
    """The next chunk of each sequence, and how it was found.

    Attributes:
        tokens: ``[B, K]``.
        num_agreeing: draws that agreed on it, ``[B]``: the whole part of 1/T, or less where a vote
            found no more; 1 for methods that compare no tokens.
        draws: head draws of this chunk, ``[B]``; `Exact` counts them as Algorithm 1 is written.
        is_fallback: whether the draws reached their cap, so that the method's fallback decided,
            bool ``[B]``.
        is_finite: whether all latents were finite, bool ``[B]``; where not, tokens mean nothing.
        saved: of `draws`, those that were never made because a round stopped at its first mismatch,
            ``[B]``; None for methods without rounds.
    """

    tokens: Tensor
    num_agreeing: Tensor
    draws: Tensor
    is_fallback: Tensor
    is_finite: Tensor
    saved: Tensor | None = None

    def pack(self) -> Tensor:
        """All fields in one int64 tensor ``[B, K + 5]``, which the host reads at once."""
        saved = torch.zeros_like(self.draws) if self.saved is None else self.saved
        fields = (self.num_agreeing, self.draws, self.is_fallback, self.is_finite, saved)
        return torch.cat([self.tokens, torch.stack(fields, dim=1)], dim=1)


class ChunkRecord(NamedTuple):
    """One chunk of one sequence on the host; fields as in `Chunk`."""

    tokens: list[int]
    num_agreeing: int
    draws: int
    is_fallback: bool
    is_finite: bool
    saved: int


def read_records(packed: list[Tensor]) -> list[list[ChunkRecord]]:
    """The record of each sequence for each packed chunk; this synchronises."""
    steps = packed[0][None] if len(packed) == 1 else torch.stack(packed)
    return [
        [
            ChunkRecord(row[:-5], row[-5], row[-4], bool(row[-3]), bool(row[-2]), row[-1])
            for row in step
        ]
        for step in steps.tolist()
    ]
