"""Rotation, cache write and attention in one kernel, split over the cache.

A program has one sequence and one key head with all query heads that share it, and a part of the
filled columns. The first part also has the new column: it alone writes the cache, and begins its
softmax with that column, so that no part is read while it is written. Each part stores its sums,
relative to its own maximum. The part that is done last adds them up in order, so that the result
does not depend on which one that is, and sets the count back to zero. Columns that are not filled
are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.device import exp2
from calm_kernels.matmul_kernels import DOT_DTYPES
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import (
    Constants,
    Launch,
    architecture,
    launch_options,
    num_processors,
    setting,
    use_fast_math,
)

__all__ = ["attention_constants", "attention_kernel", "launch_attention", "num_splits"]

MAX_SPLITS = 16
_INFINITY = tl.constexpr(float("inf"))
_LOG2_E = 1.4426950408889634


@triton.jit
def _load_rotated(pointers, mask, cos, sin, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of rotated heads, rounded as they are stored."""
    real = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    imaginary = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    return (real * cos - imaginary * sin).to(DTYPE), (real * sin + imaginary * cos).to(DTYPE)


@triton.jit
def _scores(
    left, right, keys_ptr, column, half, mask, scale, HALF: tl.constexpr, DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q · keys times `scale`, -inf outside, ``[BLOCK_G, BLOCK_N]``."""
    pointers = keys_ptr + column[None, :] * (2 * HALF) + half[:, None]
    inside = mask[None, :] & (half < HALF)[:, None]
    key_left = tl.load(pointers, mask=inside, other=0.0)  # [BLOCK_HALF, BLOCK_N]
    key_right = tl.load(pointers + HALF, mask=inside, other=0.0)
    product = tl.dot(left.to(DOT_DTYPE), key_left.to(DOT_DTYPE), input_precision=PRECISION)
    product = tl.dot(
        right.to(DOT_DTYPE), key_right.to(DOT_DTYPE), product, input_precision=PRECISION
    )
    return tl.where(mask[None, :], product * scale, -_INFINITY)


@triton.jit
def _attend(
    left, right, high, total, acc, keys_ptr, values_ptr, first, last, half, feature, scale,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of exponentials and of values with these columns, too."""
    SIZE: tl.constexpr = 2 * HALF
    DTYPE: tl.constexpr = left.dtype
    is_feature = feature < SIZE
    for begin in range(first, last, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        is_seen = column < last
        scores = _scores(
            left, right, keys_ptr, column, half, is_seen, scale, HALF, DOT_DTYPE, PRECISION
        )
        raised = tl.maximum(high, tl.max(scores, axis=1))
        weights = exp2(scores - raised[:, None], FAST)
        shrink = exp2(high - raised, FAST)
        block_ptrs = values_ptr + column[:, None] * SIZE + feature[None, :]
        block = tl.load(block_ptrs, mask=is_seen[:, None] & is_feature[None, :], other=0.0)
        acc = tl.dot(
            weights.to(DTYPE).to(DOT_DTYPE), block.to(DOT_DTYPE), acc * shrink[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
        total = total * shrink + tl.sum(weights, axis=1)
        high = raised
    return high, total, acc


@triton.jit
def _add_parts(
    sums_ptr, parts_ptr, member, offs, mask, GROUP: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All parts of the softmax in order; the first is never empty."""
    is_member = member < GROUP
    high = tl.load(parts_ptr + 2 * member, mask=is_member, other=0.0, cache_modifier=".cg")
    total = tl.load(parts_ptr + 2 * member + 1, mask=is_member, other=1.0, cache_modifier=".cg")
    acc = tl.load(sums_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
    for split in range(1, SPLITS):
        part_ptrs = parts_ptr + 2 * (split * GROUP + member)
        other = tl.load(part_ptrs, mask=is_member, other=0.0, cache_modifier=".cg")
        count = tl.load(part_ptrs + 1, mask=is_member, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            sums_ptr + split * GROUP * SIZE + offs, mask=mask, other=0.0, cache_modifier=".cg"
        )
        raised = tl.maximum(high, other)
        shrink, factor = exp2(high - raised, FAST), exp2(other - raised, FAST)
        acc = acc * shrink[:, None] + sums * factor[:, None]
        total = total * shrink + count * factor
        high = raised
    return acc / total[:, None]


@triton.jit
def _store_part(
    sums_ptr, parts_ptr, arrivals_ptr, out_ptr, pair, split, high, total, acc, member, offs_out,
    mask_out, GROUP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store this part; the last one to do so adds all of them up and sets the count to zero."""
    sums_ptr += pair * (SPLITS * GROUP * SIZE)
    parts_ptr += pair * (SPLITS * GROUP * 2)
    own = split * GROUP
    tl.store(sums_ptr + own * SIZE + offs_out, acc, mask=mask_out)
    part_ptrs = parts_ptr + 2 * (own + member)
    tl.store(part_ptrs, high, mask=member < GROUP)
    tl.store(part_ptrs + 1, total, mask=member < GROUP)
    tl.debug_barrier()  # all threads have stored before one of them counts
    arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(arrivals_ptr + pair, 0)
        result = _add_parts(
            sums_ptr, parts_ptr, member, offs_out, mask_out, GROUP, SIZE, SPLITS, FAST
        )
        tl.store(out_ptr + offs_out, result.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit(do_not_specialize=["capacity"])
def attention_kernel(
    rows_ptr, keys_ptr, values_ptr, rotation_ptr, lengths_ptr, sums_ptr, parts_ptr, arrivals_ptr,
    out_ptr, capacity, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = softmax(R q · [keys, R k]) · [values, v]; R k and v go to column `length`.

    `scale` is log2 e / √D: exponentials are powers of two.
    """
    wait_for_previous(OVERLAP)
    SIZE: tl.constexpr = 2 * HALF
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, head = pair // KV_HEADS, pair % KV_HEADS
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    keys_ptr += pair.to(tl.int64) * capacity * SIZE
    values_ptr += pair.to(tl.int64) * capacity * SIZE
    rows_ptr += sequence * ((GROUP + 2) * KV_HEADS * SIZE)

    half, feature = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_D)
    is_half, is_feature = half < HALF, feature < SIZE
    angle_ptrs = rotation_ptr + length * SIZE + 2 * half
    cos = tl.load(angle_ptrs, mask=is_half, other=0.0)
    sin = tl.load(angle_ptrs + 1, mask=is_half, other=0.0)
    member = tl.arange(0, BLOCK_G)
    query_ptrs = rows_ptr + (head * GROUP + tl.minimum(member, GROUP - 1))[:, None] * SIZE
    left, right = _load_rotated(
        query_ptrs + half[None, :], is_half[None, :], cos[None, :], sin[None, :], HALF, DTYPE
    )
    key_ptrs = rows_ptr + (GROUP * KV_HEADS + head) * SIZE + half
    key_left, key_right = _load_rotated(key_ptrs, is_half, cos, sin, HALF, DTYPE)
    value_ptrs = rows_ptr + ((GROUP + 1) * KV_HEADS + head) * SIZE + feature
    value = tl.load(value_ptrs, mask=is_feature, other=0.0)

    high = tl.full([BLOCK_G], -_INFINITY, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if split == 0:
        place = length * SIZE
        tl.store(keys_ptr + place + half, key_left, mask=is_half)
        tl.store(keys_ptr + place + HALF + half, key_right, mask=is_half)
        tl.store(values_ptr + place + feature, value, mask=is_feature)
        products = left.to(tl.float32) * key_left.to(tl.float32)[None, :]
        products += right.to(tl.float32) * key_right.to(tl.float32)[None, :]
        high = tl.sum(products, axis=1) * scale
        total += 1.0
        acc += value.to(tl.float32)[None, :]

    columns = (length + SPLITS - 1) // SPLITS
    first = split * columns
    last = tl.minimum(first + columns, length)
    high, total, acc = _attend(
        left, right, high, total, acc, keys_ptr, values_ptr, first, last, half, feature, scale,
        HALF, BLOCK_N, DOT_DTYPE, PRECISION, FAST,
    )  # fmt: skip
    offs_out = member[:, None] * SIZE + feature[None, :]
    mask_out = (member < GROUP)[:, None] & is_feature[None, :]
    out_ptr += pair * (GROUP * SIZE)
    if SPLITS == 1:
        tl.store(out_ptr + offs_out, (acc / total[:, None]).to(DTYPE), mask=mask_out)
    else:
        _store_part(
            sums_ptr, parts_ptr, arrivals_ptr, out_ptr, pair, split, high, total, acc, member,
            offs_out, mask_out, GROUP, SIZE, SPLITS, FAST,
        )  # fmt: skip


def num_splits(pairs: int, capacity: int, processors: int, block: int) -> int:
    """Parts of the cache, a power of two: programs for all processors, a block of columns each."""
    most = min(MAX_SPLITS, processors // pairs, -(-capacity // block))
    return 1 << (max(1, most).bit_length() - 1)


def attention_constants(
    size: int, kv_heads: int, group: int, splits: int, dtype: torch.dtype, arch: str, *,
    has_fast_math: bool, can_round: bool = True,
) -> Constants:  # fmt: skip
    """Of heads of `size` features, `group` of them a key; dtypes as in `layer_constants`."""
    chosen = _chosen(size, dtype, arch)
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HALF": size // 2,
        "SPLITS": splits,
        "BLOCK_G": max(16, _power_of_two(group)),
        "BLOCK_HALF": max(16, _power_of_two(size // 2)),
        "BLOCK_D": max(16, _power_of_two(size)),
        "BLOCK_N": chosen.block_rows,
        "DOT_DTYPE": DOT_DTYPES[dtype if can_round else torch.float32],
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
        "FAST": has_fast_math,
    }
    return overlapped(constants, launch_options(chosen), arch)


def _chosen(size: int, dtype: torch.dtype, arch: str) -> Launch:
    return setting("decode_attention" + ".fp32" * (dtype == torch.float32), arch, size)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def launch_attention(
    rows: Tensor, keys: Tensor, values: Tensor, rotation: Tensor, lengths: Tensor,
    arrivals: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Write the next column of each sequence's cache and fill `out`, ``[B, heads D]``."""
    batch, kv_heads, capacity, size = keys.shape
    group, arch = out.shape[1] // (kv_heads * size), architecture(keys.device)
    block = _chosen(size, keys.dtype, arch).block_rows
    splits = num_splits(batch * kv_heads, capacity, num_processors(keys.device), block)
    constants, options = attention_constants(
        size, kv_heads, group, splits, keys.dtype, arch, has_fast_math=use_fast_math(),
        can_round=not is_interpreted(),
    )  # fmt: skip
    parts = batch * kv_heads * splits * group if splits > 1 else 0
    sums = keys.new_empty(parts, size, dtype=torch.float32)
    attention_kernel[(batch * kv_heads, splits)](
        rows, keys, values, rotation, lengths, sums,
        keys.new_empty(parts, 2, dtype=torch.float32), arrivals, out, capacity,
        _LOG2_E / size**0.5, **constants, **options,
    )  # fmt: skip
