"""The energy score by direct differences: targets given, or drawn one at a time in registers.

One program a patch. It reads each given target once; drawn targets never exist in memory. Exact in
float32 for every latent size; gram_kernels.py is the faster way to many drawn targets of many
dimensions.
"""

import triton
import triton.language as tl

from calm_kernels.device import exp2, power_terms, sum_features
from calm_kernels.energy_score.tile_kernels import (
    feature_tile,
    load_features,
    load_samples,
    load_weight,
    pair_terms,
    store_features,
    store_samples,
    store_terms,
)
from calm_kernels.noise_kernels import load_key, normal_at

__all__ = ["direct_kernel"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_STREAM_TARGETS = tl.constexpr(1)  # noise.Stream.TARGETS


@triton.jit
def _add_target(
    total, pull, stretch, offset, point, EXPONENT: tl.constexpr, NEED_POSTERIOR: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Add |d_i - z|^α, its gradient by d and, for log_std, that gradient times z."""
    difference = offset - point[:, None]
    value, slope = power_terms(sum_features(difference * difference), EXPONENT, FAST)
    term = slope[None, :, None, None] * difference
    if NEED_POSTERIOR:
        stretch += term * point[:, None]
    return total + value, pull + term, stretch, term


@triton.jit
def _sum_targets(
    offset, mask, targets_ptr, dtargets_ptr, std, feature, mask_feature, num_targets,
    stride_target_m, stride_target_l, dtarget_scale, k0, k1, c1, c2, c3,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, IS_GIVEN: tl.constexpr, IS_DRAWN: tl.constexpr,
    IS_ANTITHETIC: tl.constexpr, IS_SPLIT: tl.constexpr, NEED_TARGETS: tl.constexpr,
    NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Σ_m |d_i - z_m|^α of a block of samples and its gradients; stores those of given targets."""
    total = tl.zeros([offset.shape[1]], tl.float32)
    pull = tl.zeros_like(offset)
    stretch = tl.zeros_like(offset)
    for m in range(num_targets):
        if IS_DRAWN:
            point = normal_at(m, feature, k0, k1, c1, c2, c3, (WIDTH + 7) // 8, FAST) * std
        else:
            point = load_features(targets_ptr, feature, stride_target_l, mask_feature, 0.0)
            targets_ptr += stride_target_m
            if not IS_GIVEN:
                point *= std
        total, pull, stretch, term = _add_target(
            total, pull, stretch, offset, point, EXPONENT, NEED_POSTERIOR, FAST
        )
        if IS_ANTITHETIC:
            total, pull, stretch, term = _add_target(
                total, pull, stretch, offset, -point, EXPONENT, NEED_POSTERIOR, FAST
            )
        if NEED_TARGETS:
            dtarget = dtarget_scale * tl.sum(tl.where(mask, term, 0.0), axis=1)
            if IS_SPLIT:  # blocks of samples add to one another's; the memory starts as zeros
                dtarget += load_features(dtargets_ptr, feature, 1, feature < WIDTH, 0.0)
            store_features(dtargets_ptr, dtarget, feature, WIDTH)
            dtargets_ptr += WIDTH
    return total, pull, stretch


@triton.jit(do_not_specialize=["num_rows", "num_targets", "num_draws"])
def direct_kernel(
    samples_ptr, targets_ptr, mean_ptr, log_std_ptr, weight_ptr, seed_ptr, first_row_ptr, terms_ptr,
    dsamples_ptr, dtargets_ptr, dmean_ptr, dlog_std_ptr, num_rows, num_targets, num_draws,
    stride_n, stride_r, stride_l, stride_target_m, stride_target_r, stride_target_l,
    stride_mean_r, stride_mean_l, stride_std_r, stride_std_l, stride_weight, stride_seed,
    NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr, IS_GIVEN: tl.constexpr,
    IS_DRAWN: tl.constexpr, IS_ANTITHETIC: tl.constexpr, NEED_SAMPLES: tl.constexpr,
    NEED_TARGETS: tl.constexpr, NEED_POSTERIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """score = mean_{i≠j} |x_i - x_j|^α - 2 mean_{i,m} |x_i - y_m|^α of one patch, weighted."""
    row = tl.program_id(0).to(tl.int64)
    weight = load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT)
    feature = feature_tile(OUTER, LANES, INNER)
    mask_feature = feature < tl.where(weight != 0.0, WIDTH, 0)
    center = tl.zeros([OUTER, LANES, INNER], tl.float32)
    std = center
    if not IS_GIVEN:
        center = load_features(
            mean_ptr + row * stride_mean_r, feature, stride_mean_l, mask_feature, 0.0
        )
        log_std = load_features(
            log_std_ptr + row * stride_std_r, feature, stride_std_l, mask_feature, -float("inf")
        )
        std = exp2(log_std * _LOG2_E, FAST)
    k0, k1, c1, c2, c3 = 0, 0, 0, 0, 0
    if IS_DRAWN:
        k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, row, stride_seed, _STREAM_TARGETS)
    row_ptr = samples_ptr + row * stride_r
    pair_scale = weight * (2 / (NUM_SAMPLES * (NUM_SAMPLES - 1)))
    target_scale = weight * (2 / NUM_SAMPLES) / num_targets

    fidelity = 0.0
    diversity = 0.0
    dmean = tl.zeros_like(center)
    dlog_std = tl.zeros_like(center)
    for start in range(0, NUM_SAMPLES, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        mask_n = sample < NUM_SAMPLES
        mask = mask_feature[:, None] & mask_n[None, :, None, None]
        x = load_samples(row_ptr, sample, feature, stride_n, stride_l, mask, True)
        apart, pull = pair_terms(
            x, row_ptr, feature, mask_feature, stride_n, stride_l, NUM_SAMPLES, EXPONENT, FAST
        )
        diversity += tl.sum(tl.where(mask_n, apart, 0.0))
        total, slope, stretch = _sum_targets(
            x - center[:, None], mask, targets_ptr + row * stride_target_r,
            dtargets_ptr + row * num_targets * WIDTH, std, feature, mask_feature, num_draws,
            stride_target_m, stride_target_l, target_scale, k0, k1, c1, c2, c3, WIDTH, EXPONENT,
            IS_GIVEN, IS_DRAWN, IS_ANTITHETIC, NUM_SAMPLES > BLOCK_N, NEED_TARGETS,
            NEED_POSTERIOR, FAST,
        )  # fmt: skip
        fidelity += tl.sum(tl.where(mask_n, total, 0.0))
        if NEED_SAMPLES:
            out_ptr = dsamples_ptr + row * (NUM_SAMPLES * WIDTH)
            gradient = pair_scale * pull - target_scale * slope
            store_samples(out_ptr, gradient, sample, feature, NUM_SAMPLES, WIDTH)
        if NUM_SAMPLES > BLOCK_N:
            tl.debug_barrier()
        if NEED_POSTERIOR:
            dmean += tl.sum(tl.where(mask, slope, 0.0), axis=1)
            dlog_std += tl.sum(tl.where(mask, stretch, 0.0), axis=1)

    store_terms(terms_ptr, row, num_rows, target_scale * fidelity, pair_scale / 2 * diversity, 0.0)
    if NEED_POSTERIOR:
        store_features(dmean_ptr + row * WIDTH, target_scale * dmean, feature, WIDTH)
        store_features(dlog_std_ptr + row * WIDTH, target_scale * dlog_std, feature, WIDTH)
