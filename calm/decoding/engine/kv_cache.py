"""The cache: keys and values of every chunk so far, allocated once and counted in chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import UserError

__all__ = ["KVCache"]


@dataclass
class KVCache:
    """Keys and values of a batch whose sequences end in the same column.

    A shorter sequence starts further right: column c of sequence b is its chunk ``c - starts[b]``,
    and columns before its start are never attended to. All sequences grow by one column a step.

    Attributes:
        keys: ``[layers, B, heads, capacity, D]``, rotated.
        values: likewise.
        rotations: cos + i sin of the angles of each position, complex ``[capacity, D/2]``.
        starts: first column of each sequence, int64 ``[B]``.
        position: columns filled, int64 ``[1]`` on the device, if the cache is fixed: a step then
            has fixed shapes and can be replayed from a graph. None if `length` alone counts.
        is_ragged: whether a sequence starts after column 0.
        length: columns filled, counted by the host; replays of a graph are not counted.
    """

    keys: Tensor
    values: Tensor
    rotations: Tensor
    starts: Tensor
    position: Tensor | None = None
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
        starts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(keys, values, rotations, starts, starts.new_zeros(1) if is_fixed else None)

    @property
    def capacity(self) -> int:
        """Columns."""
        return self.keys.shape[3]

    def reserve(self, columns: int) -> None:
        """Raise `UserError` if there is no room for so many more columns."""
        if self.length + columns > self.capacity:
            raise UserError(
                f"the cache holds {self.capacity} chunks, {self.length} of them in use; "
                f"{columns} more do not fit: make it larger"
            )

    def begin(self, starts: list[int]) -> None:
        """Forget everything; the next prefill's sequences start in these columns."""
        self.starts.copy_(torch.tensor(starts))
        self.is_ragged = any(starts)
        self.length = 0
        if self.position is not None:
            self.position.zero_()
            # A fixed step reads all columns, and an earlier text may have left infinite numbers.
            self.keys.zero_()
            self.values.zero_()

    def advance(self, columns: int) -> None:
        """Count columns that were written."""
        self.length += columns
        if self.position is not None:
            self.position += columns

    def select(self, rows: Tensor) -> "KVCache":
        """The sequences `rows`, int64 ``[b]``, in a cache of their own."""
        return KVCache(
            self.keys[:, rows],
            self.values[:, rows],
            self.rotations,
            self.starts[rows],
            None if self.position is None else self.position.clone(),
            self.is_ragged,
            self.length,
        )
