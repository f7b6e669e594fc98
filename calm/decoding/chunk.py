"""A chunk of K tokens: as a method chooses it, and as the host reads it.

Shapes: B sequences, K tokens of a chunk.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Chunk", "ChunkRecord", "read_records"]


@dataclass(frozen=True)
class Chunk:
    """The next chunk of each sequence, and how it was found: what `chunk_record` has made.

    Attributes:
        packed: all fields in one int64 tensor ``[B, K + 5]``, which the host reads at once.
    """

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """``[B, K]``."""
        return self.packed[:, :-5]

    @property
    def num_agreeing(self) -> Tensor:
        """Draws that agreed on it, ``[B]``: the whole part of 1/T, or less where a vote found no
        more; 1 for methods that compare no tokens.
        """
        return self.packed[:, -5]

    @property
    def draws(self) -> Tensor:
        """Head draws of this chunk, ``[B]``; `Exact` counts them as Algorithm 1 is written."""
        return self.packed[:, -4]

    @property
    def is_fallback(self) -> Tensor:
        """Whether the draws reached their cap, so that the method's fallback decided, bool."""
        return self.packed[:, -3].bool()

    @property
    def is_finite(self) -> Tensor:
        """Whether all latents were finite, bool ``[B]``; where not, tokens mean nothing."""
        return self.packed[:, -2].bool()

    @property
    def saved(self) -> Tensor:
        """Of `draws`, those that were never made because a round stopped at its first mismatch,
        ``[B]``; 0 for methods without rounds.
        """
        return self.packed[:, -1]


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
