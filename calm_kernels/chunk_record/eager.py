"""The torch backend: each number of the record as a tensor, then all of them side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["advance_state_eager", "chunk_record_eager"]


def chunk_record_eager(tokens: Tensor, values: Tensor, numbers: Sequence[int | Tensor]) -> Tensor:
    """See `calm_kernels.chunk_record`; numbers are num_agreeing, draws, is_fallback and saved."""
    is_finite = values
    if values.dtype != torch.bool:
        is_finite = torch.isfinite(values).all(-1).all(0)
    columns = [
        number if isinstance(number, Tensor) else torch.full_like(tokens[:, 0], number)
        for number in numbers
    ]
    columns.insert(3, is_finite)
    return torch.cat([tokens, torch.stack([column.long() for column in columns], 1)], 1)


def advance_state_eager(
    record: Tensor, tokens: Tensor, seed: Tensor, lengths: Tensor | None
) -> None:
    """See `calm_kernels.chunk_record.advance_state`."""
    tokens.copy_(record[:, : tokens.shape[1]])
    seed[:, 1].add_(1)  # with += torch would also copy the column onto itself
    if lengths is not None:
        lengths.add_(1)
