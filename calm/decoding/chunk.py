"""A chunk of K tokens as the parts of generation hand it on: chosen, recorded, read by the host.

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
        is_fallback: whether a stated fallback decided, bool ``[B]``: the draws reached their cap.
        is_finite: whether all latents were finite, bool ``[B]``; where not, tokens mean nothing.
        saved: draws that `draws` counts, but that a round did not need because it stopped at its
            first mismatch, ``[B]``; None for methods without rounds.
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
        about = (self.num_agreeing, self.draws, self.is_fallback, self.is_finite, saved)
        return torch.cat([self.tokens, torch.stack(about, dim=1)], dim=1)


class ChunkRecord(NamedTuple):
    """One chunk of one sequence on the host; fields as in `Chunk`."""

    tokens: list[int]
    num_agreeing: int
    draws: int
    is_fallback: bool
    is_finite: bool
    saved: int


def read_records(packed: list[Tensor]) -> list[list[ChunkRecord]]:
    """For each of some packed chunks the record of each sequence; this waits for the device."""
    steps = packed[0][None] if len(packed) == 1 else torch.stack(packed)
    return [
        [
            ChunkRecord(row[:-5], row[-5], row[-4], bool(row[-3]), bool(row[-2]), row[-1])
            for row in step
        ]
        for step in steps.tolist()
    ]
