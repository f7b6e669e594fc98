"""The energy score against many drawn targets: distances by matmuls on tensor cores.

Draws live in registers and never in memory.

With d_i = x_i - mean and z_m = σ·ε_m, |d_i - z_m|² = |d_i|² + |z_m|² - 2 d_i·z_m. Centred on the
mean d and z are nearly orthogonal in many dimensions, so nothing cancels; samples among themselves
may coincide and are compared directly.

Features are held as eight slices of WORDS = ceil(L / 8), the random words that noise.py draws for a
row: feature k·WORDS + q is output k of word q, so one Philox call feeds all slices. Samples are the
narrow side of every matmul, which takes eight of them without padding. |z|² is a matmul too, of ε²
and σ²: nothing per dimension stays in registers in the loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2, power_terms
from calm_kernels.energy_score.problem import Problem, pointer_and_strides
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.energy_score.tile_kernels import load_weight, store_terms
from calm_kernels.noise_kernels import load_key, normal_slices
from calm_kernels.tuning import Constants, launch_options, widest

__all__ = ["gram_constants", "gram_kernel", "gram_score", "takes_gram"]

# With fewer dimensions d and z are too far from orthogonal for rounded operands; more need
# registers and shared memory that not every machine has.
GRAM_WIDTHS = range(64, 257)

_LOG2_E = tl.constexpr(1.4426950408889634)
_STREAM_TARGETS = tl.constexpr(1)  # noise.Stream.TARGETS


@triton.jit
def _load_slices(pointer, q, stride_l, width, WORDS: tl.constexpr):
    """Eight slices ``[BLOCK_Q]`` of one row in float32, zero from `width` on."""
    slices = ()
    for k in tl.static_range(8):
        feature = k * WORDS + q
        mask = (q < WORDS) & (feature < width)
        value = tl.load(pointer + feature.to(tl.int64) * stride_l, mask=mask, other=0.0)
        slices = slices + (value.to(tl.float32),)
    return slices


@triton.jit
def _load_samples(
    pointer, q, sample, stride_n, stride_l, width, NUM_SAMPLES: tl.constexpr,
    WORDS: tl.constexpr, IS_LAST: tl.constexpr = False,
):  # fmt: skip
    """Eight slices ``[BLOCK_N, BLOCK_Q]`` of the samples in float32; see `tile_kernels` for the
    last read.
    """
    slices = ()
    offs_n = sample.to(tl.int64)[:, None] * stride_n
    for k in tl.static_range(8):
        feature = k * WORDS + q
        mask = ((q < WORDS) & (feature < width))[None, :] & (sample < NUM_SAMPLES)[:, None]
        offs = offs_n + (feature.to(tl.int64) * stride_l)[None, :]
        if IS_LAST:
            loaded = tl.load(pointer + offs, mask=mask, other=0.0, eviction_policy="evict_first")
        else:
            loaded = tl.load(pointer + offs, mask=mask, other=0.0)
        slices = slices + (loaded.to(tl.float32),)
    return slices


@triton.jit
def _load_offsets(
    x, pointer, q, sample, stride_l, width, NUM_SAMPLES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Slices of x - mean; the mean is read for every sample, so that padding is zero."""
    center = _load_samples(pointer, q, sample, 0, stride_l, width, NUM_SAMPLES, WORDS)
    d = ()
    for k in tl.static_range(8):
        d = d + (x[k] - center[k],)
    return d


@triton.jit
def _load_std(
    pointer, q, sample, stride_l, width, NUM_SAMPLES: tl.constexpr, WORDS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Slices of the standard deviation, the same for every sample, zero in padding."""
    log_std = _load_samples(pointer, q, sample, 0, stride_l, width, NUM_SAMPLES, WORDS)
    std = ()
    for k in tl.static_range(8):
        mask = ((q < WORDS) & (k * WORDS + q < width))[None, :] & (sample < NUM_SAMPLES)[:, None]
        std = std + (tl.where(mask, exp2(log_std[k] * _LOG2_E, FAST), 0.0),)
    return std


@triton.jit
def _rounded(x, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A number as a matmul's operand, rounded to nearest: tensor cores cut float32 off at 10 bits,
    a bias that no average removes.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(DOT_DTYPE)
    return result


@triton.jit
def _operand(x, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """As `_rounded`, and NaN stays NaN: adding to the bits of a GPU's NaN would carry into a 0."""
    return tl.where(x == x, _rounded(x, DOT_DTYPE, PRECISION), x.to(DOT_DTYPE))


@triton.jit
def _variance_rows(std, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """σ² ``[BLOCK_N, BLOCK_Q]`` as an operand: rounded in row 0, the rounding error in row 1."""
    row = tl.arange(0, std.shape[0])[:, None]
    variance = std * std
    rounded = _operand(variance, DOT_DTYPE, PRECISION)
    lost = _operand(variance - rounded.to(tl.float32), DOT_DTYPE, PRECISION)
    zero = tl.zeros_like(rounded)
    return tl.where(row == 0, rounded, tl.where(row == 1, lost, zero))


@triton.jit
def _pair_slices(
    x, samples_ptr, q, stride_n, stride_l, width, NUM_SAMPLES: tl.constexpr,
    WORDS: tl.constexpr, EXPONENT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """As `tile_kernels.pair_terms` on slices."""
    total = tl.zeros([x[0].shape[0]], tl.float32)
    zero = x[0] * 0.0
    pull = (zero, zero, zero, zero, zero, zero, zero, zero)
    other_ptr = samples_ptr
    for _ in range(NUM_SAMPLES):
        other = _load_slices(other_ptr, q, stride_l, width, WORDS)
        difference = ()
        square = zero
        for k in tl.static_range(8):
            difference = difference + (x[k] - other[k][None, :],)
            square += difference[k] * difference[k]
        value, slope = power_terms(tl.sum(square, axis=1), EXPONENT, FAST)
        total += value
        added = ()
        for k in tl.static_range(8):
            added = added + (pull[k] + slope[:, None] * difference[k],)
        pull = added
        other_ptr += stride_n
    return total, pull


@triton.jit
def _target_weights(cross, d2, z2, mask, EXPONENT: tl.constexpr, FAST: tl.constexpr):
    """|d - z|^α and α|d - z|^(α-2), ``[BLOCK_M, BLOCK_N]``; a square that rounding made negative
    counts as 0.
    """
    square = d2[None, :] + z2[:, None] - 2 * cross
    return power_terms(tl.where(mask, square, 0.0), EXPONENT, FAST)


@triton.jit
def _sum_draws(
    d, std, mask_n, q, num_draws, k0, k1, c1, c2, c3, WORDS: tl.constexpr, BLOCK_M: tl.constexpr,
    EXPONENT: tl.constexpr, IS_ANTITHETIC: tl.constexpr, NEED_POSTERIOR: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Σ_m |d - z_m|^α and Σ_m w_m, ``[BLOCK_N]``; slices Σ_m w_m ε_m and Σ_m w_m ε_m², ``[BLOCK_Q,
    BLOCK_N]``.
    """
    BLOCK_N: tl.constexpr = d[0].shape[0]
    BLOCK_Q: tl.constexpr = d[0].shape[1]
    d2 = d[0] * d[0]
    for k in tl.static_range(1, 8):
        d2 += d[k] * d[k]
    d2 = tl.sum(d2, axis=1)
    scaled = ()
    variance = ()
    for k in tl.static_range(8):
        scaled = scaled + (_operand(d[k] * std[k], DOT_DTYPE, PRECISION),)
        variance = variance + (_variance_rows(std[k], DOT_DTYPE, PRECISION),)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mass = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    none = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    pull = (none, none, none, none, none, none, none, none)
    spread = pull
    for start in range(0, num_draws, BLOCK_M):
        draw = start + tl.arange(0, BLOCK_M)
        c0 = (draw[None, :] * WORDS + q[:, None]).to(tl.uint32)
        zero = c0 * 0
        noise = normal_slices(c0, c1 + zero, c2 + zero, c3 + zero, k0, k1, FAST)
        cross = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        z2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        rounded = ()
        squared = ()
        for k in tl.static_range(8):
            rounded = rounded + (_rounded(noise[k], DOT_DTYPE, PRECISION),)
            squared = squared + (_rounded(noise[k] * noise[k], DOT_DTYPE, PRECISION),)
            cross = tl.dot(
                tl.trans(rounded[k]), tl.trans(scaled[k]), cross, input_precision=PRECISION
            )
            z2 = tl.dot(tl.trans(squared[k]), tl.trans(variance[k]), z2, input_precision=PRECISION)
        mask = (draw < num_draws)[:, None] & mask_n[None, :]
        z2 = tl.sum(z2, axis=1)
        value, slope = _target_weights(cross, d2, z2, mask, EXPONENT, FAST)
        total += value
        both = slope
        if IS_ANTITHETIC:
            value, opposite = _target_weights(-cross, d2, z2, mask, EXPONENT, FAST)
            total += value
            both += opposite
            slope -= opposite
        mass += both
        weights = _operand(slope, DOT_DTYPE, PRECISION)
        added = ()
        for k in tl.static_range(8):
            added = added + (tl.dot(rounded[k], weights, pull[k], input_precision=PRECISION),)
        pull = added
        if NEED_POSTERIOR:
            weights = _operand(both, DOT_DTYPE, PRECISION)
            widened = ()
            for k in tl.static_range(8):
                widened = widened + (
                    tl.dot(squared[k], weights, spread[k], input_precision=PRECISION),
                )
            spread = widened
    return tl.sum(total, axis=0), tl.sum(mass, axis=0), pull, spread


@triton.jit
def _target_gradients(d, std, mass, pull, spread, scale, NEED_POSTERIOR: tl.constexpr):
    """Slices of the fidelity's gradient by the samples, and of this block's share of those by mean
    and log_std.
    """
    slopes = ()
    dmean = ()
    dlog_std = ()
    for k in tl.static_range(8):
        drawn = tl.trans(pull[k]) * std[k]  # Σ_m w_m z_m
        slope = scale * (mass[:, None] * d[k] - drawn)
        slopes = slopes + (slope,)
        if NEED_POSTERIOR:
            own = std[k] * std[k] * tl.trans(spread[k])
            dmean = dmean + (tl.sum(slope, axis=0),)
            dlog_std = dlog_std + (scale * tl.sum(d[k] * drawn - own, axis=0),)
    return slopes, dmean, dlog_std


@triton.jit
def _add_row(pointer, slices, q, is_first, IS_ONLY: tl.constexpr, WIDTH: tl.constexpr):
    """Add eight slices ``[BLOCK_Q]`` to one row of contiguous memory.

    Earlier blocks of samples wrote their part there: a loop over blocks has no registers for it.
    """
    WORDS: tl.constexpr = (WIDTH + 7) // 8
    for k in tl.static_range(8):
        place = pointer + k * WORDS + q
        mask = (q < WORDS) & (k * WORDS + q < WIDTH)
        value = slices[k]
        if not IS_ONLY:
            value += tl.load(place, mask=mask & (not is_first), other=0.0)
        tl.store(place, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_targets", "num_draws"])
def gram_kernel(
    samples_ptr, mean_ptr, log_std_ptr, weight_ptr, seed_ptr, first_row_ptr, score_ptr, terms_ptr,
    dsamples_ptr, dmean_ptr, dlog_std_ptr, num_rows, num_targets, num_draws, stride_n, stride_r,
    stride_l, stride_mean_r, stride_mean_l, stride_std_r, stride_std_l, stride_weight, stride_seed,
    NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr,
    IS_ANTITHETIC: tl.constexpr, NEED_SAMPLES: tl.constexpr, NEED_POSTERIOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """score = mean_{i≠j} |x_i - x_j|^α - 2 mean_{i,m} |x_i - y_m|^α of one position, weighted."""
    WORDS: tl.constexpr = (WIDTH + 7) // 8
    row = tl.program_id(0).to(tl.int64)
    weight = load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT)
    width = tl.where(weight != 0.0, WIDTH, 0)
    draws = tl.where(weight != 0.0, num_draws, 0)
    q = tl.arange(0, BLOCK_Q)
    k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, row, stride_seed, _STREAM_TARGETS)
    row_ptr = samples_ptr + row * stride_r
    mean_row = mean_ptr + row * stride_mean_r
    std_row = log_std_ptr + row * stride_std_r
    pair_scale = weight * (2 / (NUM_SAMPLES * (NUM_SAMPLES - 1)))
    target_scale = weight * (2 / NUM_SAMPLES) / num_targets

    fidelity = 0.0
    diversity = 0.0
    IS_ONLY: tl.constexpr = NUM_SAMPLES <= BLOCK_N
    for start in range(0, NUM_SAMPLES, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        mask_n = sample < NUM_SAMPLES
        x = _load_samples(row_ptr, q, sample, stride_n, stride_l, width, NUM_SAMPLES, WORDS)
        d = _load_offsets(x, mean_row, q, sample, stride_mean_l, width, NUM_SAMPLES, WORDS)
        std = _load_std(std_row, q, sample, stride_std_l, width, NUM_SAMPLES, WORDS, FAST)
        total, mass, pull, spread = _sum_draws(
            d, std, mask_n, q, draws, k0, k1, c1, c2, c3, WORDS, BLOCK_M, EXPONENT,
            IS_ANTITHETIC, NEED_POSTERIOR, DOT_DTYPE, PRECISION, FAST,
        )  # fmt: skip
        fidelity += tl.sum(total)
        slopes, dmean, dlog_std = _target_gradients(
            d, std, mass, pull, spread, target_scale, NEED_POSTERIOR
        )
        if NEED_POSTERIOR:
            _add_row(dmean_ptr + row * WIDTH, dmean, q, start == 0, IS_ONLY, WIDTH)
            _add_row(dlog_std_ptr + row * WIDTH, dlog_std, q, start == 0, IS_ONLY, WIDTH)
            if not IS_ONLY:
                tl.debug_barrier()
        # Read again: the loop over draws has no registers to keep it.
        x = _load_samples(row_ptr, q, sample, stride_n, stride_l, width, NUM_SAMPLES, WORDS, True)
        apart, pair_pull = _pair_slices(
            x, row_ptr, q, stride_n, stride_l, width, NUM_SAMPLES, WORDS, EXPONENT, FAST
        )
        diversity += tl.sum(tl.where(mask_n, apart, 0.0))
        if NEED_SAMPLES:
            offs_n = (row * NUM_SAMPLES + sample)[:, None] * WIDTH
            for k in tl.static_range(8):
                mask = ((q < WORDS) & (k * WORDS + q < WIDTH))[None, :] & mask_n[:, None]
                values = (pair_scale * pair_pull[k] - slopes[k]).to(dsamples_ptr.dtype.element_ty)
                tl.store(dsamples_ptr + offs_n + (k * WORDS + q)[None, :], values, mask=mask)

    store_terms(
        score_ptr, terms_ptr, row, num_rows, target_scale * fidelity, pair_scale / 2 * diversity,
        0.0,
    )  # fmt: skip


def takes_gram(problem: Problem) -> bool:
    """Whether `gram_kernel` takes drawn targets; `direct_kernel` takes the others."""
    if problem.width in GRAM_WIDTHS or problem.dtype.itemsize > 2:
        return problem.width in GRAM_WIDTHS
    widest_row = widest("energy_score.gram.wide", problem.arch)
    return GRAM_WIDTHS.stop <= problem.width <= widest_row


def gram_constants(problem: Problem, *, is_antithetic: bool) -> Constants:
    """Compile-time constants and compiler options of `gram_kernel`.

    Matmuls are of bf16 for 16-bit inputs, of tf32 for float32 (AMD: float32).
    """
    launch = problem.setting("gram" if problem.width in GRAM_WIDTHS else "gram.wide")
    is_rounded = problem.dtype.itemsize == 2 and problem.can_round
    words = -(-problem.width // 8)
    constants = problem.common() | {
        "IS_ANTITHETIC": is_antithetic,
        "BLOCK_N": launch.block_n,
        "BLOCK_Q": max(16, 1 << (words - 1).bit_length()),
        "BLOCK_M": launch.block_m,
        "DOT_DTYPE": tl.bfloat16 if is_rounded else tl.float32,
        "PRECISION": "ieee" if is_rounded or not problem.has_fast_math else "tf32",
    }
    return constants, launch_options(launch)


def gram_score(
    problem: Problem, samples: Tensor, mean: Tensor, log_std: Tensor, weight: Tensor | None,
    draws: TargetDraws, score: Tensor, terms: Tensor, dsamples: Tensor, dmean: Tensor,
    dlog_std: Tensor,
) -> None:  # fmt: skip
    """Launch: score ``[R]``, terms ``[3, R]`` and gradients, written to the last five tensors."""
    num_rows = samples.shape[1]
    constants, options = gram_constants(problem, is_antithetic=draws.is_antithetic)
    pointer, (stride,) = pointer_and_strides(weight, samples)
    with torch.cuda.device_of(samples):
        gram_kernel[(num_rows,)](
            samples, mean, log_std, pointer, draws.seed, draws.first_row, score, terms, dsamples,
            dmean, dlog_std, num_rows, draws.num_targets, draws.num_drawn, *samples.stride(),
            *mean.stride(), *log_std.stride(), stride, draws.stride_seed, **constants, **options,
        )  # fmt: skip
