"""The cache: keys and values of every chunk so far, allocated once and counted in chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import UserError

__all__ = ["KVCache"]


@dataclass
class KVCache:
    """Keys and values of a batch, in which every sequence has a length of its own.

    Column c of a sequence is its chunk c. Columns from its length on hold nothing: they are never
    attended to, and the next chunk takes the first of them.

    Attributes:
        keys: ``[layers, B, heads, capacity, D]``, rotated.
        values: likewise.
        rotations: cos + i sin of the angles of each position, complex ``[capacity, D/2]``.
        lengths: chunks of each sequence, int64 ``[B]`` on the device.
        arrivals: zeros in which the attention kernel counts, int32 ``[B * heads]``.
        is_fixed: whether a step attends to all columns, masked, so that it has fixed shapes and can
            be replayed from a graph.
        is_ragged: whether lengths differ.
        length: chunks of the longest sequence, counted by the host; replays of a graph are not
            counted.
    """

    keys: Tensor
    values: Tensor
    rotations: Tensor
    lengths: Tensor
    arrivals: Tensor
    is_fixed: bool = False
    is_ragged: bool = False
    length: int = 0

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        rotations: Tensor,
        is_fixed: bool,
    ) -> "KVCache":
        """An empty cache. It holds zeros, because masked columns must be finite too."""
        shape = (2, num_layers, batch_size, num_heads, capacity, head_dim)
        keys, values = torch.zeros(shape, device=device, dtype=dtype)
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        arrivals = lengths.new_zeros(batch_size * num_heads, dtype=torch.int32)
        return cls(keys, values, rotations, lengths, arrivals, is_fixed)

    @property
    def capacity(self) -> int:
        """Columns."""
        return self.keys.shape[3]

    def begin(self, lengths: list[int]) -> None:
        """Forget everything: the sequences get these lengths, and a prefill fills them.

        Raises:
            UserError: the cache is smaller.
        """
        self.length = 0
        self.reserve(max(lengths))
        self.length, self.is_ragged = max(lengths), len(set(lengths)) > 1
        self.lengths.copy_(torch.tensor(lengths))
        if self.is_fixed:
            # A fixed step reads all columns, and an earlier text may have left infinite numbers.
            self.keys.zero_()
            self.values.zero_()

    def reserve(self, columns: int) -> None:
        """Raise `UserError` if there is no room for so many more columns."""
        if self.length + columns > self.capacity:
            raise UserError(
                f"the cache holds {self.capacity} chunks, {self.length} of them in use; "
                f"{columns} more do not fit: make it larger"
            )

    def select(self, rows: Tensor) -> "KVCache":
        """The sequences `rows`, int64 ``[b]``, in a cache of their own."""
        return KVCache(
            self.keys[:, rows],
            self.values[:, rows],
            self.rotations,
            self.lengths[rows],
            self.arrivals.new_zeros(len(rows) * self.keys.shape[2]),
            self.is_fixed,
            self.is_ragged,
            self.length,
        )

    def slot(self, row: int) -> "KVCache":
        """One sequence, as a cache of B = 1 in this cache's memory; the host counts it apart."""
        one = slice(row, row + 1)
        arrivals = self.arrivals[row * self.keys.shape[2] :][: self.keys.shape[2]]
        return KVCache(
            self.keys[:, one],
            self.values[:, one],
            self.rotations,
            self.lengths[one],
            arrivals,
            self.is_fixed,
        )
