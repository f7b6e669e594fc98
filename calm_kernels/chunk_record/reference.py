"""The record, number by number."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["advance_state_reference", "chunk_record_reference"]


def chunk_record_reference(
    tokens: Tensor, values: Tensor, numbers: Sequence[int | Tensor]
) -> Tensor:
    """See `calm_kernels.chunk_record`; numbers are num_agreeing, draws, is_fallback and saved."""
    rows = []
    for row, ids in enumerate(tokens.tolist()):
        checked = values[:, row].flatten() if values.dim() == 3 else values[row : row + 1]
        if values.dtype == torch.bool:
            is_finite = bool(checked)
        else:
            is_finite = all(math.isfinite(value) for value in checked.tolist())
        own = [int(number[row]) if isinstance(number, Tensor) else number for number in numbers]
        rows.append([*ids, *own[:3], int(is_finite), own[3]])
    found = torch.tensor(rows, dtype=torch.int64, device=tokens.device)
    return found.view(len(tokens), tokens.shape[1] + 5)


def advance_state_reference(
    record: Tensor, tokens: Tensor, seed: Tensor, lengths: Tensor | None
) -> None:
    """See `calm_kernels.chunk_record.advance_state`."""
    for row, numbers in enumerate(record.tolist()):
        for slot in range(tokens.shape[1]):
            tokens[row, slot] = numbers[slot]
        seed[row, 1] += 1
        if lengths is not None:
            lengths[row] += 1
