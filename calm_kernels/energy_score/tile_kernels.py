"""Device functions of the energy score's kernels: a register tile of samples, pairs, stores.

The samples of a position are a tile ``[OUTER, BLOCK_N, LANES, INNER]`` whose feature axis is split
so that a lane holds many features of one sample: sums over features stay in registers but for
log2(LANES) exchanges. Rows of features without the sample axis are ``[OUTER, LANES, INNER]``,
quantities of a sample ``[BLOCK_N]``. Padding holds zeros.
"""

import triton
import triton.language as tl

from calm_kernels.device import power_terms, sum_features

__all__ = [
    "feature_tile",
    "load_features",
    "load_samples",
    "load_target_weight",
    "load_weight",
    "pair_terms",
    "store_added",
    "store_features",
    "store_samples",
    "store_terms",
]


@triton.jit
def feature_tile(OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """Feature numbers ``[OUTER, LANES, INNER]``."""
    outer = tl.arange(0, OUTER)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    return outer * INNER + tl.arange(0, INNER)[None, None, :]


@triton.jit
def load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT: tl.constexpr):
    """Weight of the position, 1 where none was given."""
    weight = tl.cast(1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row * stride_weight).to(tl.float32)
    return weight


@triton.jit
def load_target_weight(pointer, row_weight, HAS_TARGET_WEIGHTS: tl.constexpr):
    """Weight of one target, 1 where none was given; not read where the position's weight is 0."""
    weight = tl.cast(1.0, tl.float32)
    if HAS_TARGET_WEIGHTS:
        weight = tl.load(pointer, mask=row_weight != 0.0, other=0.0).to(tl.float32)
    return weight


@triton.jit
def load_features(pointer, feature, stride, mask, other):
    """One row of features in float32, ``[OUTER, LANES, INNER]``."""
    return tl.load(pointer + feature.to(tl.int64) * stride, mask=mask, other=other).to(tl.float32)


@triton.jit
def load_samples(
    pointer, sample, feature, stride_n, stride_l, mask, IS_LAST: tl.constexpr
):  # fmt: skip
    """Samples of one position in float32, ``[OUTER, BLOCK_N, LANES, INNER]``.

    The last read is marked as such, which also keeps the compiler from holding on to the first.
    """
    offs = sample.to(tl.int64)[None, :, None, None] * stride_n
    offs += (feature.to(tl.int64) * stride_l)[:, None]
    if IS_LAST:
        loaded = tl.load(pointer + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        loaded = tl.load(pointer + offs, mask=mask, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def pair_terms(
    x, samples_ptr, feature, mask_feature, stride_n, stride_l,
    NUM_SAMPLES: tl.constexpr, EXPONENT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Σ_j |x_i - x_j|^α, ``[BLOCK_N]``, and Σ_j α|x_i - x_j|^(α-2) (x_i - x_j); differences are
    taken directly.
    """
    total = tl.zeros([x.shape[1]], tl.float32)
    pull = tl.zeros_like(x)
    other_ptr = samples_ptr
    for _ in range(NUM_SAMPLES):
        other = load_features(other_ptr, feature, stride_l, mask_feature, 0.0)
        difference = x - other[:, None]  # [OUTER, BLOCK_N, LANES, INNER]
        value, slope = power_terms(sum_features(difference * difference), EXPONENT, FAST)
        total += value
        pull += slope[None, :, None, None] * difference
        other_ptr += stride_n
    return total, pull


@triton.jit
def store_samples(
    pointer, gradient, sample, feature, NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of one position's samples into contiguous memory ``[N, L]``."""
    offs = sample[None, :, None, None] * WIDTH + feature[:, None]
    mask = (feature < WIDTH)[:, None] & (sample < NUM_SAMPLES)[None, :, None, None]
    tl.store(pointer + offs, gradient.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_features(pointer, values, feature, WIDTH: tl.constexpr):
    """One row of features into contiguous memory."""
    tl.store(pointer + feature, values.to(pointer.dtype.element_ty), mask=feature < WIDTH)


@triton.jit
def store_added(pointer, value, is_first, IS_ONLY: tl.constexpr):
    """One number, added to what earlier blocks of samples stored in its place."""
    if not IS_ONLY:
        value += tl.load(pointer, mask=not is_first, other=0.0)
    tl.store(pointer, value)


@triton.jit
def store_terms(score_ptr, terms_ptr, row, num_rows, fidelity, diversity, max_r2):
    """A position's score; its fidelity, diversity and largest r2 into ``[3, R]``."""
    tl.store(score_ptr + row, diversity - fidelity)
    pointer = terms_ptr + row
    tl.store(pointer, fidelity)
    pointer += num_rows  # step by step: 2 * num_rows may not fit into 32 bits
    tl.store(pointer, diversity)
    pointer += num_rows
    tl.store(pointer, max_r2)
