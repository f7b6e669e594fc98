"""Reparameterization in one pass each way: noise and dropout are drawn in registers, and drawn
again in the backward.

A program holds BLOCK_ROWS rows as eight slices ``[BLOCK_ROWS, BLOCK_Q]`` of WORDS = ceil(L / 8)
features, which are the outputs of one Philox call of noise.py. What was drawn is never stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2
from calm_kernels.noise_kernels import load_key, normal_slices, philox, uniform_at
from calm_kernels.tuning import Constants, architecture, launch_options, setting, use_fast_math

__all__ = ["backward_kernel", "constants", "forward_kernel", "write_gradient", "write_latents"]

_ALL, _GIVEN, _DRAWN = 0, 1, 2  # KEEP: elements that dropout keeps

_LOG2_E = tl.constexpr(1.4426950408889634)
_STREAM_LATENT = tl.constexpr(3)  # noise.Stream.LATENT
_STREAM_LATENT_KEEP = tl.constexpr(4)  # noise.Stream.LATENT_KEEP
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def _load_slice(pointer, row, feature, stride_r, stride_l, mask):
    offs = row[:, None] * stride_r + feature.to(tl.int64)[None, :] * stride_l
    return tl.load(pointer + offs, mask=mask, other=0).to(tl.float32)


@triton.jit
def _slice_mask(k, row, q, num_rows, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    return (row < num_rows)[:, None] & ((q < WORDS) & (k * WORDS + q < WIDTH))[None, :]


@triton.jit
def _noise_slices(
    noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_r, stride_l, stride_seed,
    IS_GIVEN: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """ε in eight slices, read or drawn."""
    if IS_GIVEN:
        slices = ()
        for k in tl.static_range(8):
            mask = _slice_mask(k, row, q, num_rows, WIDTH, WORDS)
            given = _load_slice(noise_ptr, row, k * WORDS + q, stride_r, stride_l, mask)
            slices = slices + (given,)
    else:
        safe = tl.minimum(row, num_rows - 1)
        k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, safe, stride_seed, _STREAM_LATENT)
        c0 = (q[None, :] + safe[:, None] * 0).to(tl.uint32)
        zero = c0 * 0
        slices = normal_slices(
            c0, c1[:, None] + zero, c2[:, None] + zero, c3[:, None] + zero, k0[:, None],
            k1[:, None], FAST,
        )  # fmt: skip
    return slices


@triton.jit
def _keep_slices(
    keep_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_r, stride_l, stride_seed, dropout,
    KEEP: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Factors keep / (1 - dropout) in eight slices. KEEP: 0 all, 1 read, 2 drawn."""
    slices = ()
    if KEEP == 1:
        for k in tl.static_range(8):
            mask = _slice_mask(k, row, q, num_rows, WIDTH, WORDS)
            given = _load_slice(keep_ptr, row, k * WORDS + q, stride_r, stride_l, mask)
            slices = slices + (given / (1 - dropout),)
    else:
        safe = tl.minimum(row, num_rows - 1)
        k0, k1, c1, c2, c3 = load_key(
            seed_ptr, first_row_ptr, safe, stride_seed, _STREAM_LATENT_KEEP
        )
        k0, k1, c1, c2, c3 = k0[:, None], k1[:, None], c1[:, None], c2[:, None], c3[:, None]
        column = q[None, :] + (safe[:, None] * 0).to(tl.int32)
        if WIDTH % 8 == 0:
            # A uniform's word serves slices 2j or 2j + 1: two calls for eight slices.
            zero = (column * 0).to(tl.uint32)
            low = philox(column.to(tl.uint32), c1 + zero, c2 + zero, c3 + zero, k0, k1)
            high = philox((column + WORDS).to(tl.uint32), c1 + zero, c2 + zero, c3 + zero, k0, k1)
            for j in tl.static_range(4):
                slices = slices + (_keep_factor(low[j], dropout), _keep_factor(high[j], dropout))
        else:
            for k in tl.static_range(8):
                drawn = uniform_at(0, column + k * WORDS, k0, k1, c1, c2, c3, (WIDTH + 3) // 4)
                slices = slices + (tl.where(drawn >= dropout, 1 / (1 - dropout), 0.0),)
    return slices


@triton.jit
def _keep_factor(word, dropout):
    drawn = (word >> 8).to(tl.float32) * _UNIFORM_STEP
    return tl.where(drawn >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    states_ptr, noise_ptr, keep_ptr, seed_ptr, first_row_ptr, latent_ptr, kl_ptr, num_rows,
    stride_r, stride_l, stride_noise_r, stride_noise_l, stride_keep_r, stride_keep_l, stride_seed,
    kl_floor, dropout, WIDTH: tl.constexpr, IS_GIVEN: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z = keep/(1-p) (μ + σε);  kl = Σ max((μ² + σ² - 1)/2 - ln σ, floor)."""
    WORDS: tl.constexpr = (WIDTH + 7) // 8
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = tl.arange(0, BLOCK_Q)
    noise = _noise_slices(
        noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_noise_r, stride_noise_l,
        stride_seed, IS_GIVEN, WIDTH, WORDS, FAST,
    )  # fmt: skip
    if KEEP > 0:
        keep = _keep_slices(
            keep_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_keep_r, stride_keep_l,
            stride_seed, dropout, KEEP, WIDTH, WORDS,
        )  # fmt: skip
    kl = tl.zeros([BLOCK_ROWS, BLOCK_Q], tl.float32)
    for k in tl.static_range(8):
        feature = k * WORDS + q
        mask = _slice_mask(k, row, q, num_rows, WIDTH, WORDS)
        mean = _load_slice(states_ptr, row, feature, stride_r, stride_l, mask)
        log_std = _load_slice(states_ptr, row, feature + WIDTH, stride_r, stride_l, mask)
        std = exp2(log_std * _LOG2_E, FAST)
        divergence = 0.5 * (mean * mean + std * std - 1) - log_std
        floored = tl.maximum(divergence, kl_floor, propagate_nan=tl.PropagateNan.ALL)
        kl += tl.where(mask, floored, 0.0)
        latent = mean + std * noise[k]
        if KEEP > 0:
            latent *= keep[k]
        offs = row[:, None] * WIDTH + feature[None, :]
        tl.store(latent_ptr + offs, latent.to(latent_ptr.dtype.element_ty), mask=mask)
    tl.store(kl_ptr + row, tl.sum(kl, axis=1), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    states_ptr, noise_ptr, keep_ptr, seed_ptr, first_row_ptr, dlatent_ptr, dkl_ptr, dstates_ptr,
    num_rows, stride_r, stride_l, stride_noise_r, stride_noise_l, stride_keep_r, stride_keep_l,
    stride_seed, stride_dlatent_r, stride_dlatent_l, stride_dkl, kl_floor, dropout,
    WIDTH: tl.constexpr, IS_GIVEN: tl.constexpr, KEEP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dμ = keep/(1-p) dz + [kl >= floor] dkl μ;  dlnσ = keep/(1-p) dz εσ + [kl >= floor] dkl (σ² -
    1).
    """
    WORDS: tl.constexpr = (WIDTH + 7) // 8
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    q = tl.arange(0, BLOCK_Q)
    noise = _noise_slices(
        noise_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_noise_r, stride_noise_l,
        stride_seed, IS_GIVEN, WIDTH, WORDS, FAST,
    )  # fmt: skip
    if KEEP > 0:
        keep = _keep_slices(
            keep_ptr, seed_ptr, first_row_ptr, row, q, num_rows, stride_keep_r, stride_keep_l,
            stride_seed, dropout, KEEP, WIDTH, WORDS,
        )  # fmt: skip
    dkl = tl.load(dkl_ptr + row * stride_dkl, mask=row < num_rows, other=0.0)[:, None]
    for k in tl.static_range(8):
        feature = k * WORDS + q
        mask = _slice_mask(k, row, q, num_rows, WIDTH, WORDS)
        mean = _load_slice(states_ptr, row, feature, stride_r, stride_l, mask)
        log_std = _load_slice(states_ptr, row, feature + WIDTH, stride_r, stride_l, mask)
        dlatent = _load_slice(dlatent_ptr, row, feature, stride_dlatent_r, stride_dlatent_l, mask)
        if KEEP > 0:
            dlatent *= keep[k]
        std = exp2(log_std * _LOG2_E, FAST)
        divergence = 0.5 * (mean * mean + std * std - 1) - log_std
        free = tl.where(divergence >= kl_floor, dkl, 0.0)
        dmean = (dlatent + free * mean).to(dstates_ptr.dtype.element_ty)
        dlog_std = dlatent * noise[k] * std + free * (std * std - 1)
        offs = row[:, None] * (2 * WIDTH) + feature[None, :]
        tl.store(dstates_ptr + offs, dmean, mask=mask)
        tl.store(dstates_ptr + offs + WIDTH, dlog_std.to(dstates_ptr.dtype.element_ty), mask=mask)


def constants(
    width: int, arch: str, *, is_given: bool, keep: int, has_fast_math: bool
) -> Constants:
    """Compile-time constants and compiler options of both kernels."""
    launch = setting("reparameterize", arch, width)
    words = 1 << (-(-width // 8) - 1).bit_length()
    chosen = {
        "WIDTH": width,
        "IS_GIVEN": is_given,
        "KEEP": keep,
        "BLOCK_ROWS": max(1, launch.block_rows * 16 // words),
        "BLOCK_Q": words,
        "FAST": has_fast_math,
    }
    return chosen, launch_options(launch)


def _arguments(
    states: Tensor, noise: Tensor | None, keep: Tensor | None, seed: Tensor | None,
    first_row: Tensor | None, dropout: float,
) -> tuple[list[Tensor], tuple[int, ...], dict[str, Any], dict[str, Any], int]:  # fmt: skip
    """What both launches share: pointers and strides of the draws, constants, options, grid.

    For what is not given the states stand, which the kernel then does not read in its place.
    """
    mode = _GIVEN if keep is not None else _DRAWN if dropout > 0 else _ALL
    width = states.shape[1] // 2
    chosen, options = constants(
        width, architecture(states.device), is_given=noise is not None, keep=mode,
        has_fast_math=use_fast_math(),
    )  # fmt: skip
    pointers = [states if given is None else given for given in (noise, keep, seed, first_row)]
    strides = (
        *((0, 0) if noise is None else noise.stride()),
        *((0, 0) if keep is None else keep.stride()),
        0 if seed is None or seed.dim() == 1 else 2,
    )
    return pointers, strides, chosen, options, -(-states.shape[0] // chosen["BLOCK_ROWS"])


def write_latents(
    states: Tensor, noise: Tensor | None, keep: Tensor | None, seed: Tensor | None,
    first_row: Tensor | None, latent: Tensor, kl: Tensor, *, kl_floor: float, dropout: float,
) -> None:  # fmt: skip
    """Launch: latent ``[R, L]`` and KL ``[R]`` of states ``[R, 2L]``."""
    pointers, strides, chosen, options, grid = _arguments(
        states, noise, keep, seed, first_row, dropout
    )
    with torch.cuda.device_of(states):
        forward_kernel[(grid,)](
            states, *pointers, latent, kl, len(states), *states.stride(),
            *strides, kl_floor, dropout, **chosen, **options,
        )  # fmt: skip


def write_gradient(
    states: Tensor, noise: Tensor | None, keep: Tensor | None, seed: Tensor | None,
    first_row: Tensor | None, dlatent: Tensor, dkl: Tensor, dstates: Tensor, *, kl_floor: float,
    dropout: float,
) -> None:  # fmt: skip
    """Launch: gradient ``[R, 2L]`` of the states."""
    pointers, strides, chosen, options, grid = _arguments(
        states, noise, keep, seed, first_row, dropout
    )
    with torch.cuda.device_of(states):
        backward_kernel[(grid,)](
            states, *pointers, dlatent, dkl, dstates, len(states),
            *states.stride(), *strides, *dlatent.stride(), dkl.stride(0), kl_floor, dropout,
            **chosen, **options,
        )  # fmt: skip
