"""The kernels of the record and of the state: a program has a sequence.

A number of the record is an argument of the launch or a pointer to one for each sequence. Any
combination is a compiled form of its own, of which a model launches one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting

__all__ = [
    "advance_constants",
    "advance_kernel",
    "move_on",
    "record_constants",
    "record_kernel",
    "write_record",
]

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _number(number, row):
    if number.dtype.is_ptr():
        number = tl.load(number + row)
    return number.to(tl.int64)


@triton.jit
def _are_finite(
    values_ptr, row, count, width, stride_n, stride_r, stride_l, BLOCK: tl.constexpr
):  # fmt: skip
    """1 if all values of the sequence are finite, else 0; a NaN is below no number."""
    values_ptr += row * stride_r
    is_finite = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        offs = index // width * stride_n + index % width * stride_l
        value = tl.load(values_ptr + offs, mask=index < count, other=0.0)
        if value.dtype != tl.float64:
            value = value.to(tl.float32)
        is_finite &= (tl.abs(value) < _INFINITY).to(tl.int32)
    return tl.min(is_finite, axis=0).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "num_agreeing", "draws", "is_fallback", "saved", "count", "stride_n", "stride_r",
    ]
)  # fmt: skip
def record_kernel(
    tokens_ptr, values_ptr, num_agreeing, draws, is_fallback, saved, out_ptr, count, width,
    stride_n, stride_r, stride_l, IS_ANSWER: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = [tokens, num_agreeing, draws, is_fallback, all |values| < ∞, saved]."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    slot = tl.arange(0, BLOCK_K)
    tokens = tl.load(tokens_ptr + row * SIZE + slot, mask=slot < SIZE, other=0)
    out_ptr += row.to(tl.int64) * (SIZE + 5)
    tl.store(out_ptr + slot, tokens, mask=slot < SIZE)
    if IS_ANSWER:
        is_finite = tl.load(values_ptr + row * stride_r).to(tl.int64)
    else:
        is_finite = _are_finite(values_ptr, row, count, width, stride_n, stride_r, stride_l, BLOCK)
    tl.store(out_ptr + SIZE, _number(num_agreeing, row))
    tl.store(out_ptr + SIZE + 1, _number(draws, row))
    tl.store(out_ptr + SIZE + 2, _number(is_fallback, row))
    tl.store(out_ptr + SIZE + 3, is_finite)
    tl.store(out_ptr + SIZE + 4, _number(saved, row))


@triton.jit
def advance_kernel(
    record_ptr, tokens_ptr, seed_ptr, lengths_ptr, stride_record, stride_number, stride_tokens,
    stride_token, stride_seed, stride_offset, stride_length, HAS_LENGTHS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """tokens = record[:, :SIZE], seed[:, 1] += 1, lengths += 1."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    numbers = tl.load(
        record_ptr + row * stride_record + slot * stride_number, mask=slot < SIZE, other=0
    )
    tl.store(tokens_ptr + row * stride_tokens + slot * stride_token, numbers, mask=slot < SIZE)
    seed_ptr += row * stride_seed + stride_offset
    tl.store(seed_ptr, tl.load(seed_ptr) + 1)
    if HAS_LENGTHS:
        lengths_ptr += row * stride_length
        tl.store(lengths_ptr, tl.load(lengths_ptr) + 1)


def advance_constants(patch_size: int, arch: str, *, has_lengths: bool) -> Constants:
    """Compile-time constants and compiler options of `advance_kernel`."""
    block = 1 << (patch_size - 1).bit_length()
    constants = {"HAS_LENGTHS": has_lengths, "SIZE": patch_size, "BLOCK_K": block}
    options = launch_options(setting("chunk_record", arch, 1), num_warps=1)
    return overlapped(constants, options, arch)


def move_on(record: Tensor, tokens: Tensor, seed: Tensor, lengths: Tensor | None) -> None:
    """Launch: write tokens, seed and lengths in place."""
    constants, options = advance_constants(
        tokens.shape[1], architecture(record.device), has_lengths=lengths is not None
    )
    counted = seed if lengths is None else lengths
    advance_kernel[(len(record),)](
        record, tokens, seed, counted, *record.stride(), *tokens.stride(), *seed.stride(),
        counted.stride(0), **constants, **options,
    )  # fmt: skip


def record_constants(patch_size: int, arch: str, *, is_answer: bool) -> Constants:
    """Compile-time constants and compiler options of the kernel."""
    chosen = setting("chunk_record", arch, 1)
    constants = {
        "IS_ANSWER": is_answer,
        "SIZE": patch_size,
        "BLOCK_K": 1 << (patch_size - 1).bit_length(),
        "BLOCK": chosen.block_rows,
    }
    return overlapped(constants, launch_options(chosen), arch)


def write_record(
    tokens: Tensor, values: Tensor, numbers: Sequence[int | Tensor], out: Tensor
) -> None:
    """Launch: fill `out`, ``[B, K + 5]``."""
    is_answer = values.dtype == torch.bool
    constants, options = record_constants(
        tokens.shape[1], architecture(tokens.device), is_answer=is_answer
    )
    num_draws, _, width = (0, 0, 1) if is_answer else values.shape
    strides = (0, values.stride(0), 1) if is_answer else values.stride()
    record_kernel[(len(tokens),)](
        tokens, values, *numbers, out, num_draws * width, max(1, width), *strides, **constants,
        **options,
    )  # fmt: skip
