"""The public functions: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_int64,
    check_shape,
    check_tensor,
)
from calm_kernels.chunk_record.eager import advance_state_eager, chunk_record_eager
from calm_kernels.chunk_record.reference import advance_state_reference, chunk_record_reference

__all__ = ["advance_state", "chunk_record"]

MAX_ELEMENTS = 2**31  # that offsets of 32 bits reach


def chunk_record(
    tokens: Tensor,
    values: Tensor,
    *,
    num_agreeing: int | Tensor = 1,
    draws: int | Tensor = 1,
    is_fallback: bool | Tensor = False,
    saved: int | Tensor = 0,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """What the host reads of a decoded chunk, in one tensor.

    record = [tokens, num_agreeing, draws, is_fallback, is_finite, saved]

    is_finite is 1 where all values of a sequence are finite numbers, else 0.

    Args:
        tokens: int64 ``[B, K]``, K >= 1.
        values: what has to be finite, ``[N, B, L]``, floating; or the answer, bool ``[B]``.
        num_agreeing: one number, or int64 ``[B]``.
        draws: likewise.
        is_fallback: a bool, or bool ``[B]``.
        saved: one number, or int64 ``[B]``.
        backend: see `calm_kernels.backend`; all give the same bits.

    Returns: int64 ``[B, K + 5]``. Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape, or a number
            beyond 64 bits.

    Cost: in Triton one launch, a program a sequence, which reads its N L values.
    """
    check_tensor("tokens", tokens)
    check_dtype("tokens", tokens, (torch.int64,))
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape [B, K] with K >= 1, got {tuple(tokens.shape)}")
    batch = len(tokens)
    check_tensor("values", values)
    check_device("values", values, "tokens", tokens)
    check_dtype("values", values, (*FLOATS, torch.bool))
    if values.dtype == torch.bool:
        check_shape("values", values, (batch,), "an answer for each sequence")
    elif values.dim() != 3 or values.shape[1] != batch:
        raise ValueError(f"values must have shape [N, {batch}, L], got {tuple(values.shape)}")
    named = {
        "num_agreeing": num_agreeing, "draws": draws, "is_fallback": is_fallback, "saved": saved,
    }  # fmt: skip
    numbers = [_checked(name, number, tokens) for name, number in named.items()]
    obstacle = "takes values of less than 2^31 elements" if _is_large(values) else None
    match resolve(backend, "chunk_record", tokens, obstacle=obstacle):
        case Backend.REFERENCE:
            return chunk_record_reference(tokens, values, numbers)
        case Backend.TRITON:
            from calm_kernels.chunk_record.function import chunk_record_triton

            return chunk_record_triton(tokens, values, numbers)
        case _:
            return chunk_record_eager(tokens, values, numbers)


def advance_state(
    record: Tensor,
    tokens: Tensor,
    seed: Tensor,
    lengths: Tensor | None,
    *,
    backend: Backend | str = Backend.AUTO,
) -> None:
    """Move a batch that is being decoded on by one chunk, in place.

    tokens = record[:, :K],    offset of the seed + 1,    lengths + 1

    Args:
        record: of the chunk, int64 ``[B, K + 5]``, see `chunk_record`.
        tokens: what the next step reads, int64 ``[B, K]``; overwritten.
        seed: int64 ``[B, 2]`` of (seed, offset); the offset is raised.
        lengths: columns of a cache that are filled, int64 ``[B]``; raised, or None
            where no column was filled.
        backend: see `calm_kernels.backend`; all give the same bits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape.

    Cost: in Triton one launch.
    """
    check_tensor("record", record, min_dim=2)
    check_tensor("tokens", tokens, min_dim=2)
    batch, size = len(record), record.shape[1] - 5
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "tokens": (tokens, (batch, size)), "seed": (seed, (batch, 2)),
    }  # fmt: skip
    if lengths is not None:
        shapes["lengths"] = (lengths, (batch,))
    check_dtype("record", record, (torch.int64,))
    for name, (tensor, shape) in shapes.items():
        check_tensor(name, tensor)
        check_dtype(name, tensor, (torch.int64,))
        check_shape(name, tensor, shape, f"of a record {tuple(record.shape)}")
        check_device(name, tensor, "record", record)
    match resolve(backend, "advance_state", record):
        case Backend.REFERENCE:
            advance_state_reference(record, tokens, seed, lengths)
        case Backend.TRITON:
            from calm_kernels.chunk_record.function import advance_state_triton

            advance_state_triton(record, tokens, seed, lengths)
        case _:
            advance_state_eager(record, tokens, seed, lengths)


def _checked(name: str, number: int | Tensor, tokens: Tensor) -> int | Tensor:
    if not isinstance(number, Tensor):
        is_flag = name == "is_fallback"
        if not isinstance(number, int) or isinstance(number, bool) != is_flag:
            kind = "a bool" if is_flag else "a whole number"
            raise TypeError(f"{name} must be {kind} or a tensor, got {number!r}")
        return check_int64(name, int(number))
    check_dtype(name, number, (torch.bool,) if name == "is_fallback" else (torch.int64,))
    check_shape(name, number, (len(tokens),), "a number for each sequence")
    check_device(name, number, "tokens", tokens)
    return number


def _is_large(values: Tensor) -> bool:
    """Whether a place in the values does not fit into 32 bits."""
    reach = zip(values.shape, values.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in reach) >= MAX_ELEMENTS
