"""Tokens drawn in two launches: splits of a row, then the split that a draw falls into.

A split is BLOCK_V neighbouring logits. Exponentials are relative to the largest of their split,
where they are summed, and the sums relative to the largest of the row, where splits are. A split
with a logit that is not finite has NaN as its largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.noise_kernels import load_key, philox
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting

__all__ = ["draw_constants", "draw_kernel", "split_constants", "split_kernel", "write_tokens"]

_INFINITY, _NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def _scaled(logits_ptr, row, token, vocab_size, stride_r, temperature):
    """x = logits / T, -inf past the last token."""
    logits_ptr += row.to(tl.int64) * stride_r
    logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=-_INFINITY)
    return logits.to(tl.float32) / temperature


@triton.jit
def _uniform(
    uniforms_ptr, seed_ptr, first_row, row, draw, num_draws, stride_seed, stream,
    IS_GIVEN: tl.constexpr,
):  # fmt: skip
    """u of this draw in float64: read, or that of `uniform_draws` for rows of one element."""
    if IS_GIVEN:
        uniform = tl.load(uniforms_ptr + row.to(tl.int64) * num_draws + draw)
    else:
        k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row, row.to(tl.int64), stride_seed, 0)
        word, _, _, _ = philox(draw.to(tl.uint32), c1, c2, c3, k0, k1 ^ stream.to(tl.uint32))
        uniform = ((word >> 8).to(tl.float32) * _UNIFORM_STEP).to(tl.float64)
    return uniform


@triton.jit
def split_kernel(
    logits_ptr, high_ptr, total_ptr, vocab_size, stride_r, temperature, BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of each split ``[R, splits]``: high = max x, NaN if an x is not finite, and in float64
    total = Σ exp(x - high).
    """
    wait_for_previous(OVERLAP)
    row, split = tl.program_id(0), tl.program_id(1)
    token = split * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _scaled(logits_ptr, row, token, vocab_size, stride_r, temperature)
    is_endless = (token < vocab_size) & ~(tl.abs(x) < _INFINITY)
    is_wrong = tl.max(is_endless.to(tl.int32), axis=0) > 0
    x = tl.where(is_wrong, 0.0, x)
    high = tl.max(x, axis=0)
    place = row.to(tl.int64) * tl.num_programs(1) + split
    tl.store(high_ptr + place, tl.where(is_wrong, _NAN, high))
    tl.store(total_ptr + place, tl.sum(tl.exp(x - high).to(tl.float64), axis=0))


@triton.jit
def _first_beyond(mass, goal):
    """First index whose cumulative mass is beyond the goal; else the last that has a mass."""
    index = tl.arange(0, mass.shape[0])
    first = tl.sum((tl.cumsum(mass, axis=0) <= goal).to(tl.int32), axis=0)
    return tl.minimum(first, tl.max(tl.where(mass > 0.0, index, 0), axis=0))


@triton.jit(do_not_specialize=["first_row", "num_splits", "num_draws", "stride_seed", "stream"])
def draw_kernel(
    logits_ptr, uniforms_ptr, seed_ptr, first_row, high_ptr, total_ptr, token_ptr, finite_ptr,
    vocab_size, num_splits, num_draws, stride_r, stride_seed, stream, temperature,
    IS_GREEDY: tl.constexpr, IS_GIVEN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """token = first v with Σ_{w ≤ v} exp(x_w) > u Σ_w exp(x_w), or the first of the largest x."""
    wait_for_previous(OVERLAP)
    row, draw = tl.program_id(0) // num_draws, tl.program_id(0) % num_draws
    split, index = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    offs, is_split = row.to(tl.int64) * num_splits + split, split < num_splits
    high = tl.load(high_ptr + offs, mask=is_split, other=-_INFINITY)
    is_finite = tl.min((high == high).to(tl.int32), axis=0) > 0
    high = tl.where(high == high, high, 0.0)  # of a row whose tokens mean nothing
    largest = tl.max(high, axis=0)
    if IS_GREEDY:
        chosen = tl.min(tl.where(high == largest, split, BLOCK_S - 1), axis=0)
        x = _scaled(logits_ptr, row, chosen * BLOCK_V + index, vocab_size, stride_r, temperature)
        found = tl.min(tl.where(x == largest, index, BLOCK_V - 1), axis=0)
    else:
        uniform = _uniform(
            uniforms_ptr, seed_ptr, first_row, row, draw, num_draws, stride_seed, stream, IS_GIVEN
        )
        factor = tl.exp(high - largest).to(tl.float64)
        mass = tl.load(total_ptr + offs, mask=is_split, other=0.0) * factor
        goal = uniform * tl.sum(mass, axis=0)
        chosen = _first_beyond(mass, goal)
        left = goal - tl.sum(tl.where(split < chosen, mass, 0.0), axis=0)
        is_chosen = split == chosen
        own = tl.max(tl.where(is_chosen, high, -_INFINITY), axis=0)
        x = _scaled(logits_ptr, row, chosen * BLOCK_V + index, vocab_size, stride_r, temperature)
        left /= tl.sum(tl.where(is_chosen, factor, 0.0), axis=0)
        found = _first_beyond(tl.exp(x - own).to(tl.float64), left)
    token = tl.minimum(chosen * BLOCK_V + found, vocab_size - 1)
    tl.store(token_ptr + row.to(tl.int64) * num_draws + draw, token.to(tl.int64))
    tl.store(finite_ptr + row, is_finite)


def split_constants(arch: str) -> Constants:
    """Compile-time constants and compiler options of the first kernel."""
    chosen = setting("softmax_draws", arch, 1)
    return overlapped({"BLOCK_V": chosen.block_vocab}, launch_options(chosen), arch)


def draw_constants(vocab_size: int, arch: str, *, is_greedy: bool, is_given: bool) -> Constants:
    """Compile-time constants and compiler options of the second kernel."""
    constants, options = split_constants(arch)
    splits = -(-vocab_size // constants["BLOCK_V"])
    constants |= {
        "IS_GREEDY": is_greedy, "IS_GIVEN": is_given, "BLOCK_S": 1 << (splits - 1).bit_length(),
    }  # fmt: skip
    return constants, options


def write_tokens(
    logits: Tensor, uniforms: Tensor | None, seed: Tensor | None, stream: int, temperature: float,
    tokens: Tensor, is_finite: Tensor,
) -> None:  # fmt: skip
    """Launch both kernels: fill tokens ``[R, N]`` and finiteness ``[R]``."""
    (rows, vocab_size), arch = logits.shape, architecture(logits.device)
    is_greedy = temperature == 0
    scale = 1.0 if is_greedy else temperature
    constants, options = split_constants(arch)
    splits = -(-vocab_size // constants["BLOCK_V"])
    high = logits.new_empty(rows, splits, dtype=torch.float32)
    total = logits.new_empty(rows, splits, dtype=torch.float64)
    split_kernel[(rows, splits)](
        logits, high, total, vocab_size, logits.stride(0), scale, **constants, **options
    )
    constants, options = draw_constants(
        vocab_size, arch, is_greedy=is_greedy, is_given=uniforms is not None
    )
    stride_seed = 0 if seed is None or seed.dim() == 1 else 2
    draw_kernel[(tokens.numel(),)](  # one axis: others end at 65,535
        logits, high if uniforms is None else uniforms, high if seed is None else seed, 0, high,
        total, tokens, is_finite, vocab_size, splits, tokens.shape[1], logits.stride(0),
        stride_seed, stream, scale, **constants, **options,
    )  # fmt: skip
