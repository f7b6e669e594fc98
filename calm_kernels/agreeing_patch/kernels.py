"""Algorithm 2 on the device: one launch counts equal chunks, one chooses.

`count_kernel` compares every candidate with all of its sequence, token by token: exact for any
integers, without a sort, spread over as many programs as there are blocks of candidates.
`choose_kernel` holds a sequence in one program. The weights of all counts come from one scan: with
M the largest count and s the number of draws that must agree,

    w(c) / w(M) = Π_{j = c+1 .. M} (1 - s / j)

for whole s (binomials), for the gamma form, and for the factory form with its own exclusion.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.noise_kernels import load_key, philox
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting

__all__ = [
    "choose_constants",
    "choose_kernel",
    "count_constants",
    "count_kernel",
    "write_choices",
    "write_counts",
]

MAX_UNROLL = 8  # tokens that are compared without a loop

_STREAM_VOTE = tl.constexpr(6)  # noise.Stream.VOTE
_TOLERANCE = tl.constexpr(1e-6)  # of whole numbers, relative, as in votes.py
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit(do_not_specialize=["num_candidates", "stride_b", "stride_n"])
def count_kernel(
    candidates_ptr, counts_ptr, num_candidates, stride_b, stride_n, stride_k,
    PATCH_SIZE: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_OTHER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """How often each candidate's chunk occurs, ``[B, N]``; negative where it occurred before.

    UNROLL divides PATCH_SIZE.
    """
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    last = num_candidates - 1
    base = candidates_ptr + row * stride_b
    # Beyond the end the last candidate is read again, and not counted.
    own_ptr = base + tl.minimum(own, last).to(tl.int64) * stride_n
    occurrences = tl.zeros([BLOCK_OTHER, BLOCK_N], tl.int32)
    earlier = tl.zeros([BLOCK_OTHER, BLOCK_N], tl.int32)
    for start in range(0, num_candidates, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        other_ptr = base + tl.minimum(other, last).to(tl.int64) * stride_n
        is_equal = (other <= last)[:, None] & (own >= 0)[None, :]
        for first in range(0, PATCH_SIZE, UNROLL):
            for step in tl.static_range(UNROLL):
                mine = tl.load(own_ptr + (first + step) * stride_k)
                theirs = tl.load(other_ptr + (first + step) * stride_k)
                is_equal &= theirs[:, None] == mine[None, :]
        occurrences += is_equal.to(tl.int32)
        earlier += (is_equal & (other[:, None] < own[None, :])).to(tl.int32)
    count = tl.sum(occurrences, axis=0)
    is_first = tl.sum(earlier, axis=0) == 0
    offs = row * num_candidates + own
    tl.store(counts_ptr + offs, tl.where(is_first, count, -count), mask=own <= last)


@triton.jit
def _split(power):
    """Whole part and rest of the number of draws that must agree."""
    power = tl.maximum(power, 1.0)
    nearest = tl.floor(power + 0.5)
    is_whole = tl.abs(power - nearest) <= power * _TOLERANCE
    whole = tl.where(is_whole, nearest, tl.floor(power))
    return whole, tl.where(is_whole, 0.0, power - whole)


@triton.jit
def _weights(counts, largest, level, rest, misses, BLOCK: tl.constexpr):
    """Weight of each count, relative to that of the largest; at level 0 the count."""
    power = tl.where(level == 0.0, 1.0, level + rest)
    occurrences = (tl.arange(0, BLOCK) + 2).to(tl.float64)
    factor = tl.where(occurrences <= largest, 1.0 - power / occurrences, 1.0)
    table = tl.cumprod(factor, 0, reverse=True)  # of count 1, 2, ..., BLOCK
    weight = tl.gather(table, tl.maximum(counts - 1, 0), 0)
    least = tl.where(level == 0.0, 0.0, level + misses)
    return tl.where((counts > 0) & (counts.to(tl.float64) >= least), weight, 0.0)


@triton.jit(
    do_not_specialize=[
        "first_row", "num_candidates", "stride_b", "stride_n", "stride_power", "stride_seed",
    ]
)  # fmt: skip
def choose_kernel(
    candidates_ptr, counts_ptr, power_ptr, seed_ptr, first_row, tokens_ptr, level_ptr,
    num_candidates, stride_b, stride_n, stride_k, stride_power, stride_seed,
    IS_FACTORY: tl.constexpr, PATCH_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The first candidate at which the cumulative weight exceeds the row's share of the total."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    # Only first occurrences stand for their chunk: the others are negative.
    offs = row * num_candidates + index
    counts = tl.load(counts_ptr + offs, mask=index < num_candidates, other=0)
    largest = tl.max(counts, axis=0).to(tl.float64)
    whole, rest = _split(tl.load(power_ptr + row * stride_power))
    misses = tl.where(rest > 0.0, 1.0, 0.0) if IS_FACTORY else 0.0  # hits needed beyond the level
    level = tl.minimum(whole, largest - misses)
    weights = _weights(counts, largest, level, rest, misses, BLOCK)
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row, row, stride_seed, _STREAM_VOTE)
    word, _, _, _ = philox(c1 * 0, c1, c2, c3, k0, k1)
    share = (word >> 8).to(tl.float64) * _UNIFORM_STEP
    is_beyond = tl.cumsum(weights, 0) > share * tl.sum(weights, axis=0)
    chosen = tl.min(tl.where(is_beyond & (weights > 0.0), index, BLOCK), axis=0)
    slot = tl.arange(0, BLOCK_K)
    source = chosen.to(tl.int64) * stride_n + slot * stride_k
    tokens = tl.load(candidates_ptr + row * stride_b + source, mask=slot < PATCH_SIZE, other=0)
    tl.store(tokens_ptr + row * PATCH_SIZE + slot, tokens, mask=slot < PATCH_SIZE)
    tl.store(level_ptr + row, level.to(tl.int64))


def count_constants(patch_size: int, arch: str) -> Constants:
    """Compile-time constants and compiler options of `count_kernel`."""
    launch = setting("agreeing_patch.count", arch, patch_size)
    chosen = {
        "PATCH_SIZE": patch_size,
        "UNROLL": max(step for step in range(1, MAX_UNROLL + 1) if patch_size % step == 0),
        "BLOCK_N": launch.block_n,
        "BLOCK_OTHER": launch.block_rows,
    }
    return overlapped(chosen, launch_options(launch), arch)


def choose_constants(
    num_candidates: int, patch_size: int, arch: str, *, is_factory: bool
) -> Constants:
    """Compile-time constants and compiler options of `choose_kernel`."""
    launch = setting("agreeing_patch.choose", arch, num_candidates)
    chosen = {
        "IS_FACTORY": is_factory,
        "PATCH_SIZE": patch_size,
        "BLOCK_K": _power_of_two(patch_size),
        "BLOCK": _power_of_two(num_candidates),
    }
    return overlapped(chosen, launch_options(launch), arch)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def write_counts(candidates: Tensor, counts: Tensor) -> None:
    """Launch: signed counts ``[B, N]`` of candidates ``[B, N, K]``."""
    batch, num_candidates, patch_size = candidates.shape
    chosen, options = count_constants(patch_size, architecture(candidates.device))
    grid = (batch, -(-num_candidates // chosen["BLOCK_N"]))
    with torch.cuda.device_of(candidates):
        count_kernel[grid](
            candidates, counts, num_candidates, *candidates.stride(), **chosen, **options
        )


def write_choices(
    candidates: Tensor, counts: Tensor, power: Tensor, seed: Tensor, first_row: int | Tensor,
    tokens: Tensor, level: Tensor, *, is_factory: bool,
) -> None:  # fmt: skip
    """Launch: tokens ``[B, K]`` and level ``[B]``."""
    batch, num_candidates, patch_size = candidates.shape
    chosen, options = choose_constants(
        num_candidates, patch_size, architecture(candidates.device), is_factory=is_factory
    )
    stride_seed = 0 if seed.dim() == 1 else 2
    with torch.cuda.device_of(candidates):
        choose_kernel[(batch,)](
            candidates, counts, power, seed, first_row, tokens, level, num_candidates,
            *candidates.stride(), power.stride(0), stride_seed, **chosen, **options,
        )  # fmt: skip
