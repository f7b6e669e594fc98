"""The energy score in plain PyTorch: value and closed-form gradients in one pass over the
positions.

Arrays are ``[R, N, L]`` and worked on in blocks of positions (`row_blocks`); no ``[N, M, R, L]``
array exists. Gradients are computed with the value and stored; backward only scales them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative, without_autocast
from calm_kernels.backend import is_host_readable
from calm_kernels.energy_score.expectation import expected_power
from calm_kernels.energy_score.pairs import between, within
from calm_kernels.energy_score.quadrature import num_nodes
from calm_kernels.energy_score.row_blocks import Outputs, in_row_blocks
from calm_kernels.energy_score.targets import TargetDraws

__all__ = ["energy_score_eager", "expected_distance_eager", "gaussian_energy_score_eager"]

Needs = tuple[bool, ...]
# Which inputs need gradients -> outputs [R], and a gradient [R, ...] per input (None: no need).
Run = Callable[[Needs], tuple[Outputs, Outputs]]
# Fidelity and largest r2, ``[r]``, and gradients of samples, mean, log_std and weights of targets.
Terms = tuple[Tensor, *tuple[Tensor | None, ...]]


class _StoredGradients(torch.autograd.Function):
    """Outputs ``[R]`` that come with the gradients of the first; backward scales those by row."""

    @staticmethod
    def forward(ctx: Any, run: Run, needs: Needs, *inputs: Tensor | None) -> Outputs:
        assert inputs[0] is not None
        with without_autocast(inputs[0]):
            outputs, gradients = run(needs)
        ctx.save_for_backward(*gradients)
        ctx.like = [
            None if tensor is None else torch.empty_like(tensor, device="meta") for tensor in inputs
        ]
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


def _differentiate(run: Run, *inputs: Tensor | None) -> Any:
    """Outputs of `run` inside autograd; without grad mode it computes values only."""
    has_graph = torch.is_grad_enabled()
    needs = tuple(has_graph and tensor is not None and tensor.requires_grad for tensor in inputs)
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
    rows: slice, weight: Tensor | None, dtype: torch.dtype, *tensors: Tensor | None
) -> tuple[Any, ...]:
    """Weight ``[r]`` and inputs of these positions, row-major, in the compute dtype.

    Inputs are zero where the weight is: a masked position may hold anything, and 0 · nan is nan.
    None stays None.
    """
    loaded = [None if tensor is None else tensor[rows].to(dtype).contiguous() for tensor in tensors]
    first = loaded[0]
    assert first is not None
    if weight is None:
        return (first.new_ones(first.shape[0]), *loaded)
    weight = weight[rows].to(dtype)
    is_masked = weight == 0
    return (
        weight,
        *(v if v is None else v.masked_fill(_column(is_masked, v), 0) for v in loaded),
    )


def _without_absent(
    target_weights: Tensor | None, need_weights: bool, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Inputs ``[r, M, L]``, zero where a target's weight is 0: it may hold anything.

    If the weights need a gradient, inputs stay as they are: it is the distance to them.
    """
    if target_weights is None or need_weights:
        return inputs
    absent = target_weights == 0
    if is_host_readable(absent) and not absent.any():
        return inputs
    return tuple(value.masked_fill(absent[..., None], 0) for value in inputs)


def energy_score_eager(
    samples: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    exponent: float,
    weight: Tensor | None,
) -> Tensor:
    """Score ``[R]`` of samples ``[N, R, L]``, targets ``[M, R, L]`` with weights ``[M, R]``."""
    samples, targets = samples.transpose(0, 1), targets.transpose(0, 1)
    given = None if target_weights is None else target_weights.transpose(0, 1)
    num_samples, num_targets, width = samples.shape[1], targets.shape[1], samples.shape[2]
    dtype = _compute_dtype(samples, targets)
    share = -2 / (num_samples * num_targets) if given is None else -2 / num_samples

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        need_dx, need_dy, need_dweights = needs

        def compute(rows: slice) -> Outputs:
            scale, x, y, weights = _load(rows, weight, dtype, samples, targets, given)
            (y,) = _without_absent(weights, need_dweights, y)
            diversity, dx = _diversity(x, exponent, scale, need_dx)
            nearness, pull, dy, dweights = between(
                x, y, exponent, scale * share, weights, need_dx=need_dx, need_dy=need_dy
            )
            if dx is not None and pull is not None:
                dx += pull
            if dweights is not None:
                dweights = dweights.to(dtype) if need_dweights else None
            return (diversity + nearness).to(dtype), dx, dy, dweights

        score, *gradients = in_row_blocks(
            compute, samples.shape[0], max(num_samples, num_targets) * width, samples.device
        )
        return (score,), tuple(gradients)

    return _differentiate(run, samples, targets, given)[0]


def gaussian_energy_score_eager(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    target_weights: Tensor | None,
    exponent: float,
    draws: TargetDraws | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Score, fidelity, diversity and, without draws, the largest r2 of each position, ``[R]``.

    Samples are ``[N, R, L]``, mean and log_std ``[G, R, L]`` with weights ``[G, R]``, or G = 1
    without. Without draws the expectation over targets is exact.
    """
    samples, mean, log_std = (value.transpose(0, 1) for value in (samples, mean, log_std))
    given = None if target_weights is None else target_weights.transpose(0, 1)
    num_rows, num_samples, width = samples.shape
    dtype = _compute_dtype(samples, mean, log_std)
    num_targets = 1 if draws is None else draws.num_targets

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, x, *target, weights = _load(rows, weight, dtype, samples, mean, log_std, given)
            diversity, dx = _diversity(x, exponent, scale, needs[0])
            if draws is None:
                terms = _analytic(x, target, weights, exponent, scale, needs, dx)
            else:
                noise = draws.of(rows, width, dtype, None if weight is None else scale == 0)
                terms = _sampled(x, target, noise, exponent, scale, needs, dx)
            fidelity, *rest = terms
            sums = (diversity - fidelity, fidelity, diversity)  # in float64: large terms cancel
            return *(value.to(dtype) for value in sums), *rest

        elements = max(num_samples, num_targets) * width
        outputs = in_row_blocks(compute, num_rows, elements, samples.device)
        return outputs[:4], outputs[4:]

    return _differentiate(run, samples, mean, log_std, given)


def _diversity(
    samples: Tensor, exponent: float, weight: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted mean_{i≠j} |x_i - x_j|^α, ``[r]``, and its gradient ``[r, N, L]``."""
    num_samples = samples.shape[1]
    scale = weight * (2 / (num_samples * (num_samples - 1)))
    return within(samples, exponent, scale, need_dx=need_dx)


def _sampled(
    x: Tensor,
    target: Sequence[Tensor],
    noise: Tensor,
    exponent: float,
    weight: Tensor,
    needs: Needs,
    dx: Tensor | None,
) -> Terms:
    """Weighted fidelity, no r2, and gradients of the score: samples (into `dx`), mean, log_std, and
    none in weights of a mixture.

    Args:
        x: ``[r, N, L]``.
        target: mean and log_std, ``[r, 1, L]``.
        noise: ``[r, M, L]``.
        exponent: α.
        weight: ``[r]``.
        needs: which gradients of samples, mean, log_std.
        dx: gradient of the diversity, None where samples need none.
    """
    mean, log_std = target
    deviation = noise * torch.exp(log_std)
    scale = weight * (-2 / (x.shape[1] * deviation.shape[1]))
    need_dy = needs[1] or needs[2]
    nearness, pull, dy, _ = between(
        x - mean, deviation, exponent, scale, need_dx=needs[0], need_dy=need_dy
    )
    if dx is not None and pull is not None:
        dx += pull
    dmean = None if dy is None else dy.sum(1, keepdim=True)
    dlog_std = None if dy is None else (dy * deviation).sum(1, keepdim=True)
    return -nearness, None, dx, dmean if needs[1] else None, dlog_std if needs[2] else None, None


def _analytic(
    x: Tensor,
    target: Sequence[Tensor],
    target_weights: Tensor | None,
    exponent: float,
    weight: Tensor,
    needs: Needs,
    dx: Tensor | None,
) -> Terms:
    """As `_sampled`, with the exact expectation over targets and the largest r2 of a position.

    Mean and log_std are ``[r, G, L]``, target weights ``[r, G]``, or G = 1 without. The Gaussians
    take turns: each has its own nodes or moments, and arrays are no larger than those of one.
    """
    mean, log_std = _without_absent(target_weights, needs[3], *target)
    scale = weight[:, None] * (-2 / x.shape[1])
    scales = scale if target_weights is None else scale * target_weights  # [r, G]
    of_each = [
        _of_gaussian(x, mean[:, g], log_std[:, g], exponent, scales[:, g], needs, dx)
        for g in range(mean.shape[1])
    ]
    of_sums, of_r2, of_mean, of_log_std = zip(*of_each, strict=True)
    sums, max_r2 = torch.stack(of_sums, dim=1), torch.stack(of_r2, dim=1).amax(1)
    dmean = torch.stack(of_mean, dim=1) if needs[1] else None
    dlog_std = torch.stack(of_log_std, dim=1) if needs[2] else None
    dweights = scale * sums if needs[3] else None
    return -(scales * sums).sum(1), max_r2, dx, dmean, dlog_std, dweights


def _of_gaussian(
    x: Tensor,
    mean: Tensor,
    log_std: Tensor,
    exponent: float,
    scale: Tensor,
    needs: Needs,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Σ_n E|x_n - y|^α ``[r]`` for one Gaussian ``[r, L]``, its largest r2, and, times scale, the
    gradients of samples (added to `dx`), mean and log_std.
    """
    offset = x - mean[:, None]
    variance = torch.exp(2 * log_std)
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
    return term.value.sum(1), torch.where(scale == 0, 0.0, r2.amax(1)), dmean, dlog_std


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
