"""The energy score in plain PyTorch: value and closed-form gradients in one pass over the
positions.

Arrays are ``[R, N, L]`` and worked on in blocks of positions (`row_blocks`); no ``[N, M, R, L]``
array exists. Gradients are computed with the value and stored; backward only scales them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative, without_autocast
from calm_kernels.energy_score.expectation import expected_power
from calm_kernels.energy_score.pairs import between, within
from calm_kernels.energy_score.quadrature import num_nodes
from calm_kernels.energy_score.row_blocks import Outputs, in_row_blocks
from calm_kernels.energy_score.targets import TargetDraws

__all__ = ["energy_score_eager", "expected_distance_eager", "gaussian_energy_score_eager"]

Needs = tuple[bool, ...]
# Which inputs need gradients -> outputs [R], and a gradient [R, ...] per input (None: no need).
Run = Callable[[Needs], tuple[Outputs, Outputs]]


class _StoredGradients(torch.autograd.Function):
    """Outputs ``[R]`` that come with the gradients of the first; backward scales those by row."""

    @staticmethod
    def forward(ctx: Any, run: Run, needs: Needs, *inputs: Tensor) -> Outputs:
        with without_autocast(inputs[0]):
            outputs, gradients = run(needs)
        ctx.save_for_backward(*gradients)
        ctx.like = [torch.empty_like(tensor, device="meta") for tensor in inputs]
        ctx.mark_non_differentiable(*(tensor for tensor in outputs[1:] if tensor is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Outputs:
        refuse_second_derivative("the energy score", advice="")
        scaled: list[Tensor | None] = []
        for gradient, like in zip(ctx.saved_tensors, ctx.like, strict=True):
            if gradient is None:
                scaled.append(None)
                continue
            # dtype and strides of the input: scaled, rounded and laid out in one pass
            out = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=gradient.device
            )
            scaled.append(torch.mul(gradient, _column(upstream, gradient), out=out))
        return (None, None, *scaled)


def _differentiate(run: Run, *inputs: Tensor) -> Any:
    """Outputs of `run` inside autograd; without grad mode it computes values only."""
    needs = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    apply = _StoredGradients.apply
    if torch.compiler.is_compiling():  # loops over blocks that depend on data
        apply = torch.compiler.disable(apply)
    return apply(run, needs, *inputs)


def _column(per_row: Tensor, like: Tensor) -> Tensor:
    """``[R]`` as ``[R, 1, ...]``, to broadcast against `like`."""
    return per_row.view(-1, *[1] * (like.dim() - 1))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _load(
    rows: slice, weight: Tensor | None, dtype: torch.dtype, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Weight ``[r]`` and inputs of these positions, row-major, in the compute dtype.

    Inputs are zero where the weight is: a masked position may hold anything, and 0 · nan is nan.
    """
    loaded = [tensor[rows].to(dtype).contiguous() for tensor in tensors]
    if weight is None:
        return (loaded[0].new_ones(loaded[0].shape[0]), *loaded)
    weight = weight[rows].to(dtype)
    is_masked = weight == 0
    return (weight, *(value.masked_fill(_column(is_masked, value), 0) for value in loaded))


def energy_score_eager(
    samples: Tensor, targets: Tensor, exponent: float, weight: Tensor | None
) -> Tensor:
    """Score ``[R]`` of samples ``[N, R, L]``, targets ``[M, R, L]``."""
    samples, targets = samples.transpose(0, 1), targets.transpose(0, 1)
    num_samples, num_targets, width = samples.shape[1], targets.shape[1], samples.shape[2]
    dtype = _compute_dtype(samples, targets)

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        need_dx, need_dy = needs

        def compute(rows: slice) -> Outputs:
            scale, x, y = _load(rows, weight, dtype, samples, targets)
            diversity, dx = _diversity(x, exponent, scale, need_dx)
            scale = scale * (-2 / (num_samples * num_targets))
            nearness, pull, dy = between(x, y, exponent, scale, need_dx=need_dx, need_dy=need_dy)
            if dx is not None and pull is not None:
                dx += pull
            return (diversity + nearness).to(dtype), dx, dy

        score, *gradients = in_row_blocks(
            compute, samples.shape[0], max(num_samples, num_targets) * width, samples.device
        )
        return (score,), tuple(gradients)

    return _differentiate(run, samples, targets)[0]


def gaussian_energy_score_eager(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    exponent: float,
    draws: TargetDraws | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Score, fidelity, diversity and, without draws, the largest r2 of each position, ``[R]``.

    Samples are ``[N, R, L]``, mean and log_std ``[R, L]``. Without draws the expectation over
    targets is exact.
    """
    samples = samples.transpose(0, 1)
    num_rows, num_samples, width = samples.shape
    num_targets = 0 if draws is None else draws.num_targets
    dtype = _compute_dtype(samples, mean, log_std)

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, x, center, log_scale = _load(rows, weight, dtype, samples, mean, log_std)
            diversity, dx = _diversity(x, exponent, scale, needs[0])
            offset = x - center[:, None]
            if draws is None:
                terms = _analytic(offset, log_scale, exponent, scale, needs, dx)
            else:
                noise = draws.of(rows, width, dtype, None if weight is None else scale == 0)
                terms = _sampled(offset, log_scale, noise, exponent, scale, needs, dx)
            fidelity, *rest = terms
            sums = (diversity - fidelity, fidelity, diversity)  # in float64: large terms cancel
            return *(value.to(dtype) for value in sums), *rest

        elements = max(num_samples, num_targets) * width
        outputs = in_row_blocks(compute, num_rows, elements, samples.device)
        return outputs[:4], outputs[4:]

    return _differentiate(run, samples, mean, log_std)


def _diversity(
    samples: Tensor, exponent: float, weight: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted mean_{i≠j} |x_i - x_j|^α, ``[r]``, and its gradient ``[r, N, L]``."""
    num_samples = samples.shape[1]
    scale = weight * (2 / (num_samples * (num_samples - 1)))
    return within(samples, exponent, scale, need_dx=need_dx)


def _sampled(
    offset: Tensor,
    log_std: Tensor,
    noise: Tensor,
    exponent: float,
    weight: Tensor,
    needs: Needs,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weighted fidelity, no r2, and gradients of the score: samples (into `dx`), mean, log_std.

    Args:
        offset: x - mean, ``[r, N, L]``.
        log_std: ``[r, L]``.
        noise: ``[r, M, L]``.
        exponent: α.
        weight: ``[r]``.
        needs: which gradients of samples, mean, log_std.
        dx: gradient of the diversity, None where samples need none.
    """
    deviation = noise * torch.exp(log_std)[:, None]
    scale = weight * (-2 / (offset.shape[1] * deviation.shape[1]))
    need_dy = needs[1] or needs[2]
    nearness, pull, dy = between(
        offset, deviation, exponent, scale, need_dx=needs[0], need_dy=need_dy
    )
    if dx is not None and pull is not None:
        dx += pull
    dmean = None if dy is None else dy.sum(1)
    dlog_std = None if dy is None else (dy * deviation).sum(1)
    return -nearness, None, dx, dmean if needs[1] else None, dlog_std if needs[2] else None


def _analytic(
    offset: Tensor,
    log_std: Tensor,
    exponent: float,
    weight: Tensor,
    needs: Needs,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `_sampled`, with the exact expectation over targets and the largest r2 of a position."""
    num_samples = offset.shape[1]
    variance = torch.exp(2 * log_std)
    scale = weight * (-2 / num_samples)
    need_slope = needs[0] or needs[1]
    term, r2 = expected_power(
        offset * offset, variance, exponent, scale, need_slope=need_slope, need_dvariance=needs[2]
    )
    dmean = dlog_std = None
    if dx is not None and term.slope is not None:
        dx.addcmul_(offset, term.slope)
    if needs[1] and term.slope is not None:
        dmean = -(offset * term.slope).sum(1)
    if term.dvariance is not None:
        dlog_std = 2 * variance * term.dvariance
    max_r2 = torch.where(weight == 0, 0.0, r2.amax(1))
    return -scale * term.value.sum(1), max_r2, dx, dmean, dlog_std


def expected_distance_eager(offset: Tensor, std: Tensor, exponent: float, method: str) -> Tensor:
    """E|v|^α of v ~ N(offset, std²), both ``[R, L]``; a row is a position of one sample."""
    dtype = _compute_dtype(offset, std)

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, m, s = _load(rows, None, dtype, offset, std)
            term, _ = expected_power(
                (m * m)[:, None],
                s * s,
                exponent,
                scale,
                method=method,
                need_slope=needs[0],
                need_dvariance=needs[1],
            )
            doffset = None if term.slope is None else term.slope[:, 0] * m
            dstd = None if term.dvariance is None else 2 * s * term.dvariance
            return term.value[:, 0], doffset, dstd

        value, *gradients = in_row_blocks(
            compute, offset.shape[0], num_nodes(dtype) * offset.shape[1], offset.device
        )
        return (value,), tuple(gradients)

    return _differentiate(run, offset, std)[0]
