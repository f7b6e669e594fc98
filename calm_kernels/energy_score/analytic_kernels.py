"""The energy score with analytic targets: one program a position; value and gradients together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.device import exp2, reciprocal, sum_features
from calm_kernels.energy_score.expectation import SERIES_MIN_LATENT
from calm_kernels.energy_score.expectation_kernels import add_quadrature, series
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.energy_score.problem import Problem, pointer_and_stride
from calm_kernels.energy_score.series import MAX_R2, MAX_SHARE
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


@triton.jit(do_not_specialize=["num_rows"])
def analytic_kernel(
    samples_ptr, mean_ptr, log_std_ptr, weight_ptr, score_ptr, terms_ptr, dsamples_ptr, dmean_ptr,
    dlog_std_ptr, num_rows, stride_n, stride_r, stride_l, stride_mean_r, stride_mean_l,
    stride_std_r, stride_std_l, stride_weight, first, step, log_scale, NUM_SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr, EXPONENT: tl.constexpr, NUM_NODES: tl.constexpr, MAX_R2: tl.constexpr,
    MAX_SHARE: tl.constexpr, MAX_EXCESS: tl.constexpr, NEED_SAMPLES: tl.constexpr,
    NEED_POSTERIOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """score = mean_{i≠j} |x_i - x_j|^α - 2 mean_i E|x_i - y|^α of one position, weighted."""
    row = tl.program_id(0).to(tl.int64)
    weight = load_weight(weight_ptr, row, stride_weight, HAS_WEIGHT)
    feature = feature_tile(OUTER, LANES, INNER)
    mask_feature = feature < tl.where(weight != 0.0, WIDTH, 0)
    center = load_features(
        mean_ptr + row * stride_mean_r, feature, stride_mean_l, mask_feature, 0.0
    )
    log_std = load_features(
        log_std_ptr + row * stride_std_r, feature, stride_std_l, mask_feature, -float("inf")
    )
    variance = exp2(log_std * _TWO_LOG2_E, FAST)
    row_ptr = samples_ptr + row * stride_r
    pair_scale = weight * (2 / (NUM_SAMPLES * (NUM_SAMPLES - 1)))
    target_scale = weight * (2 / NUM_SAMPLES)

    fidelity = 0.0
    diversity = 0.0
    max_r2 = 0.0
    dmean = tl.zeros_like(variance)
    dvariance = tl.zeros_like(variance)
    for start in range(0, NUM_SAMPLES, BLOCK_N):
        sample = start + tl.arange(0, BLOCK_N)
        mask_n = sample < NUM_SAMPLES
        mask = mask_feature[:, None] & mask_n[None, :, None, None]
        x = load_samples(row_ptr, sample, feature, stride_n, stride_l, mask, False)
        value, slope, bend, block_r2 = _expectation(
            x - center[:, None], variance, mask_n, first, step, log_scale, NUM_NODES, MAX_R2,
            MAX_SHARE, MAX_EXCESS, EXPONENT, NEED_POSTERIOR, FAST,
        )  # fmt: skip
        fidelity += tl.sum(tl.where(mask_n, value, 0.0))
        max_r2 = tl.maximum(max_r2, block_r2)
        # Read again: the quadrature has no registers to keep it.
        x = load_samples(row_ptr, sample, feature, stride_n, stride_l, mask, True)
        slope = tl.where(mask, target_scale * slope * (x - center[:, None]), 0.0)
        if NEED_POSTERIOR:
            dmean += tl.sum(slope, axis=1)
            dvariance += tl.sum(tl.where(mask, bend, 0.0), axis=1)
        apart, pull = pair_terms(
            x, row_ptr, feature, mask_feature, stride_n, stride_l, NUM_SAMPLES, EXPONENT, FAST
        )
        diversity += tl.sum(tl.where(mask_n, apart, 0.0))
        if NEED_SAMPLES:
            out_ptr = dsamples_ptr + row * (NUM_SAMPLES * WIDTH)
            gradient = pair_scale * pull - slope
            store_samples(out_ptr, gradient, sample, feature, NUM_SAMPLES, WIDTH)

    max_r2 = tl.where(fidelity == fidelity, max_r2, fidelity)  # a maximum skips NaN
    store_terms(
        score_ptr, terms_ptr, row, num_rows, target_scale * fidelity, pair_scale / 2 * diversity,
        max_r2,
    )  # fmt: skip
    if NEED_POSTERIOR:
        dlog_std = -2 * target_scale * dvariance * variance
        store_features(dmean_ptr + row * WIDTH, dmean, feature, WIDTH)
        store_features(dlog_std_ptr + row * WIDTH, dlog_std, feature, WIDTH)


def analytic_constants(problem: Problem) -> Constants:
    """Compile-time constants and compiler options of `analytic_kernel`."""
    constants, options = problem.tiled("analytic")
    constants |= {
        "NUM_NODES": nodes(problem.exponent, problem.width).num_nodes,
        "MAX_R2": MAX_R2,
        "MAX_SHARE": MAX_SHARE,
        "MAX_EXCESS": 1.0 if problem.width >= SERIES_MIN_LATENT else -1.0,
    }
    return constants, options


def analytic_score(
    problem: Problem, samples: Tensor, mean: Tensor, log_std: Tensor, weight: Tensor | None,
    score: Tensor, terms: Tensor, dsamples: Tensor, dmean: Tensor, dlog_std: Tensor,
) -> None:  # fmt: skip
    """Launch: score ``[R]``, terms ``[3, R]`` and gradients, written to the last five tensors."""
    num_rows = samples.shape[1]
    constants, options = analytic_constants(problem)
    rule = nodes(problem.exponent, problem.width)
    pointer, stride = pointer_and_stride(weight, samples)
    with torch.cuda.device_of(samples):
        analytic_kernel[(num_rows,)](
            samples, mean, log_std, pointer, score, terms, dsamples, dmean, dlog_std, num_rows,
            *samples.stride(), *mean.stride(), *log_std.stride(), stride, rule.first, rule.step,
            rule.log_scale, **constants, **options,
        )  # fmt: skip
