"""The record as one custom op for torch.compile, and what is written in place and so is none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_kernels.chunk_record.kernels import move_on, write_record
from calm_kernels.operators import operator

__all__ = ["advance_state_triton", "chunk_record_triton"]


def chunk_record_triton(tokens: Tensor, values: Tensor, numbers: Sequence[int | Tensor]) -> Tensor:
    """See `calm_kernels.chunk_record`; numbers are num_agreeing, draws, is_fallback and saved."""
    in_memory = [number if isinstance(number, Tensor) else None for number in numbers]
    constants = [0 if isinstance(number, Tensor) else number for number in numbers]
    return _chunk_record_op(tokens.contiguous(), values, *in_memory, constants)


def advance_state_triton(
    record: Tensor, tokens: Tensor, seed: Tensor, lengths: Tensor | None
) -> None:
    """See `calm_kernels.chunk_record.advance_state`."""
    if len(record):
        with torch.cuda.device_of(record):
            move_on(record, tokens, seed, lengths)


@operator("chunk_record")
def _chunk_record_op(
    tokens: Tensor,
    values: Tensor,
    num_agreeing: Tensor | None,
    draws: Tensor | None,
    is_fallback: Tensor | None,
    saved: Tensor | None,
    constants: Sequence[int],
) -> Tensor:
    """A number is that in memory, or the constant in its place."""
    out = tokens.new_empty(len(tokens), tokens.shape[1] + 5)
    in_memory = (num_agreeing, draws, is_fallback, saved)
    numbers = [
        constant if tensor is None else tensor.contiguous()
        for tensor, constant in zip(in_memory, constants, strict=True)
    ]
    if len(tokens):
        with torch.cuda.device_of(tokens):
            write_record(tokens, values, numbers, out)
    return out


@_chunk_record_op.register_fake
def _(
    tokens: Tensor, values: Tensor, num_agreeing: Tensor | None, draws: Tensor | None,
    is_fallback: Tensor | None, saved: Tensor | None, constants: Sequence[int],
) -> Tensor:  # fmt: skip
    return tokens.new_empty(tokens.shape[0], tokens.shape[1] + 5)
