"""The energy score by direct differences: targets given, or drawn one at a time in registers.

One program a position. It reads each given target once; drawn targets never exist in memory. Exact
in float32 for every latent size; gram_kernels.py is faster for many drawn targets of many
dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2, power_terms, sum_features
from calm_kernels.energy_score.problem import Problem, pointer_and_strides
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.energy_score.tile_kernels import (
    feature_tile,
    load_features,
    load_samples,
    load_target_weight,
    load_weight,
    pair_terms,
    store_added,
    store_features,
    store_samples,
    store_terms,
)
from calm_kernels.noise_kernels import load_key, normal_at
from calm_kernels.tuning import Constants

__all__ = ["direct_constants", "direct_drawn_score", "direct_given_score", "direct_kernel"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_STREAM_TARGETS = tl.constexpr(1)  # noise.Stream.TARGETS


@triton.jit
def _add_target(
    total, pull, stretch, offset, point, target_weight, EXPONENT: tl.constexpr,
    HAS_TARGET_WEIGHTS: tl.constexpr, NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add w|d_i - z|^α, its gradient by d and, for log_std, that gradient times z."""
    difference = offset - point[:, None]
    value, slope = power_terms(sum_features(difference * difference), EXPONENT, FAST)
    share = value
    if HAS_TARGET_WEIGHTS:
        share = target_weight * value
        slope = target_weight * slope
    term = slope[None, :, None, None] * difference
    if NEED_POSTERIOR:
        stretch += term * point[:, None]
    return total + share, pull + term, stretch, term, value


@triton.jit
def _sum_targets(
    offset, mask, mask_n, targets_ptr, target_weights_ptr, dtargets_ptr, dtarget_weights_ptr, std,
    feature, mask_feature, weight, num_targets, stride_target_m, stride_target_l,
    stride_target_weight_m, scale, is_first, k0, k1, c1, c2, c3, WIDTH: tl.constexpr,
    EXPONENT: tl.constexpr, IS_GIVEN: tl.constexpr, IS_DRAWN: tl.constexpr,
    IS_ANTITHETIC: tl.constexpr, IS_SPLIT: tl.constexpr, NEED_TARGETS: tl.constexpr,
    HAS_TARGET_WEIGHTS: tl.constexpr, NEED_TARGET_WEIGHTS: tl.constexpr,
    NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Σ_m w_m |d_i - z_m|^α of a block of samples and its gradients; stores those of given targets
    and of their weights. A target of weight 0 is read for its weight's gradient only.
    """
    total = tl.zeros([offset.shape[1]], tl.float32)
    pull = tl.zeros_like(offset)
    stretch = tl.zeros_like(offset)
    for m in range(num_targets):
        target_weight = load_target_weight(target_weights_ptr, weight, HAS_TARGET_WEIGHTS)
        mask_target = mask_feature
        if HAS_TARGET_WEIGHTS:
            target_weights_ptr += stride_target_weight_m
            if not NEED_TARGET_WEIGHTS:
                mask_target = feature < tl.where(target_weight != 0.0, WIDTH, 0)
        if IS_DRAWN:
            point = normal_at(m, feature, k0, k1, c1, c2, c3, (WIDTH + 7) // 8, FAST) * std
        else:
            point = load_features(targets_ptr, feature, stride_target_l, mask_target, 0.0)
            targets_ptr += stride_target_m
            if not IS_GIVEN:
                point *= std
        total, pull, stretch, term, value = _add_target(
            total, pull, stretch, offset, point, target_weight, EXPONENT, HAS_TARGET_WEIGHTS,
            NEED_POSTERIOR, FAST,
        )  # fmt: skip
        if IS_ANTITHETIC:
            total, pull, stretch, term, value = _add_target(
                total, pull, stretch, offset, -point, target_weight, EXPONENT, HAS_TARGET_WEIGHTS,
                NEED_POSTERIOR, FAST,
            )  # fmt: skip
        if NEED_TARGET_WEIGHTS:
            dweight = -scale * tl.sum(tl.where(mask_n, value, 0.0))
            store_added(dtarget_weights_ptr + m, dweight, is_first, not IS_SPLIT)
        if NEED_TARGETS:
            dtarget = scale * tl.sum(tl.where(mask, term, 0.0), axis=1)
            if IS_SPLIT:  # blocks of samples add to one another's; the memory starts as zeros
                dtarget += load_features(dtargets_ptr, feature, 1, feature < WIDTH, 0.0)
            store_features(dtargets_ptr, dtarget, feature, WIDTH)
            dtargets_ptr += WIDTH
    return total, pull, stretch


@triton.jit(do_not_specialize=["num_rows", "num_targets", "num_draws"])
def direct_kernel(
    samples_ptr, targets_ptr, target_weights_ptr, mean_ptr, log_std_ptr, weight_ptr, seed_ptr,
    first_row_ptr, score_ptr, terms_ptr, dsamples_ptr, dtargets_ptr, dtarget_weights_ptr, dmean_ptr,
    dlog_std_ptr, num_rows, num_targets, num_draws, stride_n, stride_r, stride_l, stride_target_m,
    stride_target_r, stride_target_l, stride_target_weight_m, stride_target_weight_r, stride_mean_r,
    stride_mean_l, stride_std_r, stride_std_l, stride_weight, stride_seed,
    NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr, IS_GIVEN: tl.constexpr,
    IS_DRAWN: tl.constexpr, IS_ANTITHETIC: tl.constexpr, NEED_SAMPLES: tl.constexpr,
    NEED_TARGETS: tl.constexpr, NEED_POSTERIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_TARGET_WEIGHTS: tl.constexpr, NEED_TARGET_WEIGHTS: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """score = mean_{i≠j} |x_i - x_j|^α - 2 Σ_m w_m mean_i |x_i - y_m|^α of one position, weighted;
    w_m = 1/M where none are given.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT)
    feature = feature_tile(OUTER, LANES, INNER)
    mask_feature = feature < tl.where(weight != 0.0, WIDTH, 0)
    center = tl.zeros([OUTER, LANES, INNER], tl.float32)
    std = center
    if not IS_GIVEN:
        mean_ptr += row * stride_mean_r
        log_std_ptr += row * stride_std_r
        center = load_features(mean_ptr, feature, stride_mean_l, mask_feature, 0.0)
        log_std = load_features(log_std_ptr, feature, stride_std_l, mask_feature, -float("inf"))
        std = exp2(log_std * _LOG2_E, FAST)
    k0, k1, c1, c2, c3 = 0, 0, 0, 0, 0
    if IS_DRAWN:
        k0, k1, c1, c2, c3 = load_key(seed_ptr, first_row_ptr, row, stride_seed, _STREAM_TARGETS)
    row_ptr = samples_ptr + row * stride_r
    pair_scale = weight * (2 / (NUM_SAMPLES * (NUM_SAMPLES - 1)))
    target_scale = weight * (2 / NUM_SAMPLES)
    if not HAS_TARGET_WEIGHTS:
        target_scale = target_scale / num_targets
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
            x - center[:, None], mask, mask_n, targets_ptr + row * stride_target_r,
            target_weights_ptr + row * stride_target_weight_r,
            dtargets_ptr + row * num_targets * WIDTH, dtarget_weights_ptr + row * num_targets, std,
            feature, mask_feature, weight, num_draws, stride_target_m, stride_target_l,
            stride_target_weight_m, target_scale, start == 0, k0, k1, c1, c2, c3, WIDTH, EXPONENT,
            IS_GIVEN, IS_DRAWN, IS_ANTITHETIC, NUM_SAMPLES > BLOCK_N, NEED_TARGETS,
            HAS_TARGET_WEIGHTS, NEED_TARGET_WEIGHTS, NEED_POSTERIOR, FAST,
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

    store_terms(
        score_ptr, terms_ptr, row, num_rows, target_scale * fidelity, pair_scale / 2 * diversity,
        0.0,
    )  # fmt: skip
    if NEED_POSTERIOR:
        store_features(dmean_ptr + row * WIDTH, target_scale * dmean, feature, WIDTH)
        store_features(dlog_std_ptr + row * WIDTH, target_scale * dlog_std, feature, WIDTH)


def direct_constants(
    problem: Problem, *, is_given: bool, is_drawn: bool, is_antithetic: bool, need_targets: bool
) -> Constants:
    """Compile-time constants and compiler options of `direct_kernel`."""
    constants, options = problem.tiled("direct")
    constants |= problem.weighted() | {
        "IS_GIVEN": is_given,
        "IS_DRAWN": is_drawn,
        "IS_ANTITHETIC": is_antithetic,
        "NEED_TARGETS": need_targets,
    }
    return constants, options


def direct_given_score(
    problem: Problem, samples: Tensor, targets: Tensor, target_weights: Tensor | None,
    weight: Tensor | None, score: Tensor, terms: Tensor, dsamples: Tensor, dtargets: Tensor,
    dtarget_weights: Tensor, *, need_targets: bool,
) -> None:  # fmt: skip
    """Launch for given targets ``[M, R, L]``, weights ``[M, R]``: writes score ``[R]``, terms ``[3,
    R]``, gradients.
    """
    num_targets, num_rows, _ = targets.shape
    constants, options = direct_constants(
        problem, is_given=True, is_drawn=False, is_antithetic=False, need_targets=need_targets
    )
    pointer, (stride,) = pointer_and_strides(weight, samples)
    weights_pointer, weights_strides = pointer_and_strides(target_weights, samples, 2)
    if problem.num_samples > constants["BLOCK_N"]:
        dtargets.zero_()  # the kernel adds to them
    with torch.cuda.device_of(samples):
        direct_kernel[(num_rows,)](
            samples, targets, weights_pointer, samples, samples, pointer, samples, samples, score,
            terms, dsamples, dtargets, dtarget_weights, samples, samples, num_rows, num_targets,
            num_targets, *samples.stride(), *targets.stride(), *weights_strides, 0, 0, 0, 0, stride,
            0, **constants, **options,
        )  # fmt: skip


def direct_drawn_score(
    problem: Problem, samples: Tensor, mean: Tensor, log_std: Tensor, weight: Tensor | None,
    draws: TargetDraws, score: Tensor, terms: Tensor, dsamples: Tensor, dmean: Tensor,
    dlog_std: Tensor,
) -> None:  # fmt: skip
    """Launch for drawn targets, or targets of given noise, of mean and log_std ``[R, L]``; written
    as by `direct_given_score`.
    """
    num_rows, noise = samples.shape[1], draws.noise
    constants, options = direct_constants(
        problem, is_given=False, is_drawn=noise is None, is_antithetic=draws.is_antithetic,
        need_targets=False,
    )  # fmt: skip
    pointer, (stride,) = pointer_and_strides(weight, samples)
    noise_strides = (0, 0, 0) if noise is None else noise.stride()
    with torch.cuda.device_of(samples):
        direct_kernel[(num_rows,)](
            samples, samples if noise is None else noise, samples, mean, log_std, pointer,
            samples if draws.seed is None else draws.seed, draws.first_row, score, terms, dsamples,
            samples, samples, dmean, dlog_std, num_rows, draws.num_targets, draws.num_drawn,
            *samples.stride(), *noise_strides, 0, 0, *mean.stride(), *log_std.stride(), stride,
            draws.stride_seed, **constants, **options,
        )  # fmt: skip
