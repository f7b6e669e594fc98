"""The energy score with analytic targets: one program a position; value and gradients together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2, reciprocal, sum_features
from calm_kernels.energy_score.expectation import SERIES_MIN_LATENT
from calm_kernels.energy_score.expectation_kernels import add_quadrature, series
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.energy_score.problem import Problem, pointer_and_strides
from calm_kernels.energy_score.series import MAX_R2, MAX_SHARE
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
from calm_kernels.tuning import Constants

__all__ = ["analytic_constants", "analytic_kernel", "analytic_score"]

_TWO_LOG2_E = tl.constexpr(2.8853900817779268)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _relative_cumulants(offset2, variance):
    """S = E|v|², the share max σ² / S and r_k = κ_k / S^k of every sample, ``[BLOCK_N]``, as in
    series.py.
    """
    unit = tl.maximum(tl.max(variance), _TINY)
    a = variance / unit
    a2 = a * a
    mean_square = sum_features(offset2) + tl.sum(variance)
    inverse = reciprocal(tl.maximum(mean_square, _TINY))
    share = unit * inverse
    weighted = offset2 * a[:, None]
    m1 = sum_features(weighted) * inverse
    weighted *= a[:, None]
    m2 = sum_features(weighted) * inverse
    m3 = sum_features(weighted * a[:, None]) * inverse
    r2 = share * (2 * share * tl.sum(a2) + 4 * m1)
    r3 = share * share * (8 * share * tl.sum(a2 * a) + 24 * m2)
    r4 = share * share * share * (48 * share * tl.sum(a2 * a2) + 192 * m3)
    return mean_square, share, r2, r3, r4


@triton.jit
def _expectation(
    offset, variance, mask_n, first, step, log_scale, NUM_NODES: tl.constexpr, MAX_R2: tl.constexpr,
    MAX_SHARE: tl.constexpr, MAX_EXCESS: tl.constexpr, EXPONENT: tl.constexpr,
    NEED_POSTERIOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """E|v|^α of a block of samples, slopes over m, derivatives by σ², and the largest r2.

    The series where it holds for all of them, else quadrature: a loop over no nodes or over all.
    MAX_EXCESS is 1, or -1 for quadrature wherever |v| is not 0.
    """
    offset2 = offset * offset
    mean_square, share, r2, r3, r4 = _relative_cumulants(offset2, variance)
    max_r2 = tl.max(tl.where(mask_n, r2, 0.0))
    excess = tl.maximum(r2 * (1 / MAX_R2), share * (1 / MAX_SHARE))
    excess = tl.max(tl.where(mask_n & (mean_square > _TINY), excess, -2.0))
    is_far = excess > MAX_EXCESS
    spread = (
        variance[:, None] + 0.0 * offset2
    )  # zero times the tile keeps both in one register layout
    value, slope, dvariance = series(
        offset2, spread, mean_square, r2, r3, r4, is_far, EXPONENT, NEED_POSTERIOR, FAST
    )
    value, slope, dvariance = add_quadrature(
        value, slope, dvariance, offset2, spread, mean_square, tl.where(is_far, NUM_NODES, 0),
        first, step, log_scale, EXPONENT, NEED_POSTERIOR, FAST,
    )  # fmt: skip
    return value, slope, dvariance, max_r2


@triton.jit
def _store_rows(
    dmean_ptr, dlog_std_ptr, dmean, dvariance, variance, scale, feature, is_first, is_last,
    IS_ONLY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one Gaussian, added to what earlier blocks of samples stored; after the last
    block that of the variance becomes that of log_std.
    """
    if not IS_ONLY:
        mask = (feature < WIDTH) & (not is_first)
        dmean += load_features(dmean_ptr, feature, 1, mask, 0.0)
        dvariance += load_features(dlog_std_ptr, feature, 1, mask, 0.0)
    dlog_std = tl.where(is_last, -2 * scale * dvariance * variance, dvariance)
    store_features(dmean_ptr, dmean, feature, WIDTH)
    store_features(dlog_std_ptr, dlog_std, feature, WIDTH)


@triton.jit
def _add_gaussian(
    total, push, max_r2, row_ptr, mean_ptr, log_std_ptr, dmean_ptr, dlog_std_ptr,
    dtarget_weight_ptr, target_weight, target_scale, sample, feature, mask_feature, stride_n,
    stride_l, stride_mean_l, stride_std_l, first, step, log_scale, is_first, is_last,
    NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr, NUM_NODES: tl.constexpr,
    MAX_R2: tl.constexpr, MAX_SHARE: tl.constexpr, MAX_EXCESS: tl.constexpr,
    NEED_POSTERIOR: tl.constexpr, HAS_TARGET_WEIGHTS: tl.constexpr,
    NEED_TARGET_WEIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add w E|x_i - y|^α, its gradient by x_i and the largest r2 for one Gaussian y; store the
    gradients of its mean, log_std and weight. One of weight 0 is read for that of its weight only.
    """
    IS_ONLY: tl.constexpr = sample.shape[0] >= NUM_SAMPLES
    mask_n = sample < NUM_SAMPLES
    mask = mask_feature[:, None] & mask_n[None, :, None, None]
    scale = target_scale
    mask_target = mask_feature
    if HAS_TARGET_WEIGHTS:
        scale = target_scale * target_weight
        if not NEED_TARGET_WEIGHTS:
            mask_target = feature < tl.where(target_weight != 0.0, WIDTH, 0)
    center = load_features(mean_ptr, feature, stride_mean_l, mask_target, 0.0)
    log_std = load_features(log_std_ptr, feature, stride_std_l, mask_target, -float("inf"))
    variance = exp2(log_std * _TWO_LOG2_E, FAST)
    x = load_samples(row_ptr, sample, feature, stride_n, stride_l, mask, False)
    value, slope, bend, block_r2 = _expectation(
        x - center[:, None], variance, mask_n, first, step, log_scale, NUM_NODES, MAX_R2,
        MAX_SHARE, MAX_EXCESS, EXPONENT, NEED_POSTERIOR, FAST,
    )  # fmt: skip
    # Read again: the quadrature has no registers to keep it.
    x = load_samples(row_ptr, sample, feature, stride_n, stride_l, mask, True)
    slope = tl.where(mask, scale * slope * (x - center[:, None]), 0.0)
    if NEED_POSTERIOR:
        dmean = tl.sum(slope, axis=1)
        dvariance = tl.sum(tl.where(mask, bend, 0.0), axis=1)
        _store_rows(
            dmean_ptr, dlog_std_ptr, dmean, dvariance, variance, scale, feature, is_first, is_last,
            IS_ONLY, WIDTH,
        )  # fmt: skip
    if NEED_TARGET_WEIGHTS:
        dweight = -target_scale * tl.sum(tl.where(mask_n, value, 0.0))
        store_added(dtarget_weight_ptr, dweight, is_first, IS_ONLY)
    if HAS_TARGET_WEIGHTS:
        value *= target_weight
        block_r2 = tl.where(target_weight != 0.0, block_r2, 0.0)
    return x, total + value, push + slope, tl.maximum(max_r2, block_r2)


@triton.jit(do_not_specialize=["num_rows", "num_gaussians"])
def analytic_kernel(
    samples_ptr, mean_ptr, log_std_ptr, target_weights_ptr, weight_ptr, score_ptr, terms_ptr,
    dsamples_ptr, dmean_ptr, dlog_std_ptr, dtarget_weights_ptr, num_rows, num_gaussians, stride_n,
    stride_r, stride_l, stride_mean_g, stride_mean_r, stride_mean_l, stride_std_g, stride_std_r,
    stride_std_l, stride_target_weight_g, stride_target_weight_r, stride_weight, first, step,
    log_scale, NUM_SAMPLES: tl.constexpr, WIDTH: tl.constexpr, EXPONENT: tl.constexpr,
    NUM_NODES: tl.constexpr, MAX_R2: tl.constexpr, MAX_SHARE: tl.constexpr,
    MAX_EXCESS: tl.constexpr, NEED_SAMPLES: tl.constexpr, NEED_POSTERIOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_TARGET_WEIGHTS: tl.constexpr, NEED_TARGET_WEIGHTS: tl.constexpr,
    OUTER: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """score = mean_{i≠j} |x_i - x_j|^α - 2 Σ_g w_g mean_i E|x_i - y_g|^α of one position, weighted;
    without weights of targets there is one Gaussian.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT)
    feature = feature_tile(OUTER, LANES, INNER)
    mask_feature = feature < tl.where(weight != 0.0, WIDTH, 0)
    row_ptr = samples_ptr + row * stride_r
    pair_scale = weight * (2 / (NUM_SAMPLES * (NUM_SAMPLES - 1)))
    target_scale = weight * (2 / NUM_SAMPLES)
    count = num_gaussians if HAS_TARGET_WEIGHTS else 1

    fidelity = 0.0
    diversity = 0.0
    max_r2 = 0.0
    for start in range(0, NUM_SAMPLES, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        mask_n = sample < NUM_SAMPLES
        x = tl.zeros([OUTER, BLOCK_N, LANES, INNER], tl.float32)
        push = tl.zeros_like(x)
        total = tl.zeros([BLOCK_N], tl.float32)
        weights_ptr = target_weights_ptr + row * stride_target_weight_r
        mean_row = mean_ptr + row * stride_mean_r
        std_row = log_std_ptr + row * stride_std_r
        for g in range(count):
            target_weight = load_target_weight(weights_ptr, weight, HAS_TARGET_WEIGHTS)
            out = (row * count + g) * WIDTH
            x, total, push, max_r2 = _add_gaussian(
                total, push, max_r2, row_ptr, mean_row, std_row, dmean_ptr + out,
                dlog_std_ptr + out, dtarget_weights_ptr + row * count + g, target_weight,
                target_scale, sample, feature, mask_feature, stride_n, stride_l, stride_mean_l,
                stride_std_l, first, step, log_scale, start == 0, start + BLOCK_N >= NUM_SAMPLES,
                NUM_SAMPLES, WIDTH, EXPONENT, NUM_NODES, MAX_R2, MAX_SHARE, MAX_EXCESS,
                NEED_POSTERIOR, HAS_TARGET_WEIGHTS, NEED_TARGET_WEIGHTS, FAST,
            )  # fmt: skip
            weights_ptr += stride_target_weight_g
            mean_row += stride_mean_g
            std_row += stride_std_g
        fidelity += tl.sum(tl.where(mask_n, total, 0.0))
        apart, pull = pair_terms(
            x, row_ptr, feature, mask_feature, stride_n, stride_l, NUM_SAMPLES, EXPONENT, FAST
        )
        diversity += tl.sum(tl.where(mask_n, apart, 0.0))
        if NEED_SAMPLES:
            out_ptr = dsamples_ptr + row * (NUM_SAMPLES * WIDTH)
            gradient = pair_scale * pull - push
            store_samples(out_ptr, gradient, sample, feature, NUM_SAMPLES, WIDTH)
        if NUM_SAMPLES > BLOCK_N:
            tl.debug_barrier()

    max_r2 = tl.where(fidelity == fidelity, max_r2, fidelity)  # a maximum skips NaN
    store_terms(
        score_ptr, terms_ptr, row, num_rows, target_scale * fidelity, pair_scale / 2 * diversity,
        max_r2,
    )  # fmt: skip


def analytic_constants(problem: Problem) -> Constants:
    """Compile-time constants and compiler options of `analytic_kernel`."""
    # The gradient of the samples stays in registers from one Gaussian to the next.
    form = "analytic.heavy.mixture" if problem.has_target_weights else "analytic"
    constants, options = problem.tiled(form)
    constants |= problem.weighted() | {
        "NUM_NODES": nodes(problem.exponent, problem.width).num_nodes,
        "MAX_R2": MAX_R2,
        "MAX_SHARE": MAX_SHARE,
        "MAX_EXCESS": 1.0 if problem.width >= SERIES_MIN_LATENT else -1.0,
    }
    return constants, options


def analytic_score(
    problem: Problem, samples: Tensor, mean: Tensor, log_std: Tensor, target_weights: Tensor | None,
    weight: Tensor | None, score: Tensor, terms: Tensor, dsamples: Tensor, dmean: Tensor,
    dlog_std: Tensor, dtarget_weights: Tensor,
) -> None:  # fmt: skip
    """Launch: score ``[R]``, terms ``[3, R]`` and gradients, written to the last six tensors."""
    num_gaussians, num_rows, _ = mean.shape
    constants, options = analytic_constants(problem)
    rule = nodes(problem.exponent, problem.width)
    pointer, (stride,) = pointer_and_strides(weight, samples)
    weights_pointer, weights_strides = pointer_and_strides(target_weights, samples, 2)
    with torch.cuda.device_of(samples):
        analytic_kernel[(num_rows,)](
            samples, mean, log_std, weights_pointer, pointer, score, terms, dsamples, dmean,
            dlog_std, dtarget_weights, num_rows, num_gaussians, *samples.stride(), *mean.stride(),
            *log_std.stride(), *weights_strides, stride, rule.first, rule.step, rule.log_scale,
            **constants, **options,
        )  # fmt: skip
