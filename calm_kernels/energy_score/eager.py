"""The energy score in plain PyTorch: closed-form value and gradients in one pass over chunks of patches.

Work is patch-major, ``[R, N, L]``, and chunked so that intermediates stay in a core's cache; no
``[N, M, R, L]`` array exists. Gradients are computed with the value and stored; backward scales them.

Analytic targets take the series where it is accurate and quadrature for the other patches. On the CPU the
patches past the guard are gathered. Elsewhere that would wait for the device at every call, so both run
for every patch and the guard selects.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from calm_kernels.energy_score.pairs import WORKING_SET, distance_term
from calm_kernels.energy_score.quadrature import MAX_SPREAD, GaussianTerm, num_nodes, quadrature
from calm_kernels.energy_score.series import Moments, moments, series
from calm_kernels.energy_score.targets import TargetDraws

__all__ = ["energy_score", "expected_distance", "gaussian_energy_score"]

# Where the series replaces quadrature: relative variance of |v|², and the least latent size.
SERIES_MAX_R2 = 1 / 32
SERIES_MIN_LATENT = 64


Needs = tuple[bool, ...]
Outputs = tuple[Tensor | None, ...]
Run = Callable[[Needs], tuple[Outputs, Outputs]]


class _StoredGradients(torch.autograd.Function):
    """Outputs ``[R]`` computed together with the gradients of the first; backward scales what is stored.

    `run(needs)` returns outputs and one gradient ``[R, ...]`` per input, None where it is not needed.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, needs: Needs, *inputs: Tensor) -> Outputs:
        with torch.autocast(inputs[0].device.type, enabled=False):
            outputs, gradients = run(needs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(*(tensor for tensor in outputs[1:] if tensor is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Outputs:
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is None:
                scaled.append(None)
            else:
                factor = upstream.view(-1, *[1] * (gradient.dim() - 1))
                scaled.append((gradient * factor).to(dtype))
        return (None, None, *scaled)


def _differentiate(run: Run, *inputs: Tensor) -> Outputs:
    """Call `run` inside autograd, telling it which inputs need gradients (none without grad mode)."""
    needs = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    return _StoredGradients.apply(run, needs, *inputs)


def _in_chunks(
    compute: Callable[[slice], Outputs], num_rows: int, elements_per_row: int
) -> Outputs:
    """`compute` of slices of rows, its outputs ``[r, ...]`` joined along the rows."""
    step = max(1, WORKING_SET // max(1, elements_per_row))
    if num_rows <= step:
        return compute(slice(0, num_rows))
    joined: list[Tensor | None] = []
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        parts = compute(rows)
        if not joined:
            joined = [
                None if part is None else part.new_empty(num_rows, *part.shape[1:])
                for part in parts
            ]
        for whole, part in zip(joined, parts, strict=True):
            if whole is not None and part is not None:
                whole[rows] = part
    return tuple(joined)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _load(
    rows: slice, weight: Tensor | None, dtype: torch.dtype, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The weight ``[r]`` of these patches and their inputs, zero where the weight is, in the compute dtype."""
    loaded = [tensor[rows].to(dtype) for tensor in tensors]
    if weight is None:
        return (loaded[0].new_ones(loaded[0].shape[0]), *loaded)
    weight = weight[rows].to(dtype)
    is_masked = weight == 0
    masks = (is_masked.view(-1, *[1] * (tensor.dim() - 1)) for tensor in loaded)
    return (
        weight,
        *(tensor.masked_fill(mask, 0) for tensor, mask in zip(loaded, masks, strict=True)),
    )


def _diversity(
    samples: Tensor, exponent: float, weight: Tensor, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """weight · mean_{i≠j} |x_i - x_j|^α, ``[r]``, and its gradient; a pair pulls on both its samples."""
    num_samples = samples.shape[1]
    scale = 2 * weight / (num_samples * (num_samples - 1))
    term = distance_term(samples, samples, exponent, scale, need_dx=need_gradient, need_dy=False)
    return term.total / 2, term.dx


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left.add_(right)


def energy_score(
    samples: Tensor, targets: Tensor, exponent: float, weight: Tensor | None
) -> Outputs:
    """Score of samples ``[N, R, L]`` against given targets ``[M, R, L]``."""
    samples, targets = samples.transpose(0, 1), targets.transpose(0, 1)
    num_rows, num_samples, width = samples.shape
    num_targets = targets.shape[1]
    dtype = _compute_dtype(samples, targets)

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, x, y = _load(rows, weight, dtype, samples, targets)
            diversity, dx = _diversity(x, exponent, scale, needs[0])
            scale = scale * (-2 / (num_samples * num_targets))
            term = distance_term(x, y, exponent, scale, need_dx=needs[0], need_dy=needs[1])
            score = diversity + term.total
            return score, -term.total, diversity, _add(dx, term.dx), term.dy

        elements = num_samples * max(num_samples, num_targets) * width
        score, fidelity, diversity, *gradients = _in_chunks(compute, num_rows, elements)
        return (score, fidelity, diversity, None), tuple(gradients)

    return _differentiate(run, samples, targets)


def gaussian_energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    exponent: float,
    draws: TargetDraws | None,
    weight: Tensor | None,
) -> Outputs:
    """Score of samples ``[N, R, L]`` against N(mean, exp(log_std)²), both ``[R, L]``.

    Targets are drawn where `draws` is given; otherwise their expectation is exact.
    """
    samples = samples.transpose(0, 1)
    num_rows, num_samples, width = samples.shape
    dtype = _compute_dtype(samples, mean, log_std)
    per_sample = draws.num_targets if draws is not None else 0

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, x, center, log_scale = _load(rows, weight, dtype, samples, mean, log_std)
            diversity, dx = _diversity(x, exponent, scale, needs[0])
            offset = x - center[:, None]
            if draws is None:
                parts = _analytic(offset, log_scale, exponent, scale, needs)
            else:
                noise = draws.of(rows, width, dtype)
                parts = _sampled(offset, log_scale, noise, exponent, scale, needs)
            fidelity, max_r2, doffset, dmean, dlog_std = parts
            score = diversity - fidelity
            return score, fidelity, diversity, max_r2, _add(dx, doffset), dmean, dlog_std

        elements = num_samples * max(num_samples, per_sample) * width
        outputs = _in_chunks(compute, num_rows, elements)
        return outputs[:4], outputs[4:]

    return _differentiate(run, samples, mean, log_std)


def _sampled(
    offset: Tensor, log_std: Tensor, noise: Tensor, exponent: float, weight: Tensor, needs: Needs
) -> Outputs:
    """Fidelity, no r2, and the gradients of its negative: offset, mean, log_std."""
    deviation = noise * torch.exp(log_std)[:, None]  # [r, M, L]
    scale = weight * (-2 / (offset.shape[1] * deviation.shape[1]))
    need_targets = needs[1] or needs[2]
    term = distance_term(offset, deviation, exponent, scale, need_dx=needs[0], need_dy=need_targets)
    dmean = term.dy.sum(1) if needs[1] and term.dy is not None else None
    dlog_std = (term.dy * deviation).sum(1) if needs[2] and term.dy is not None else None
    return -term.total, None, term.dx, dmean, dlog_std


def _analytic(
    offset: Tensor, log_std: Tensor, exponent: float, weight: Tensor, needs: Needs
) -> Outputs:
    """As `_sampled` with the exact expectation, and the largest r2 of each patch."""
    num_samples = offset.shape[1]
    variance = torch.exp(2 * log_std)
    term, found = gaussian_term(
        offset * offset,
        variance,
        exponent,
        weight * (-2 / num_samples),
        need_slope=needs[0] or needs[1],
        need_dvariance=needs[2],
    )
    fidelity = term.value.sum(1) * weight * (2 / num_samples)
    doffset = None if term.slope is None else term.slope.mul_(offset)
    dmean = -doffset.sum(1) if needs[1] and doffset is not None else None
    dlog_std = None if term.dvariance is None else term.dvariance * variance * 2
    return fidelity, found.r2.amax(1), doffset if needs[0] else None, dmean, dlog_std


def gaussian_term(
    offset2: Tensor,
    variance: Tensor,
    exponent: float,
    scale: Tensor,
    *,
    need_slope: bool,
    need_dvariance: bool,
) -> tuple[GaussianTerm, Moments]:
    """E|v|^α by the series where it is accurate, else by quadrature; arguments as `quadrature`."""
    found = moments(offset2, variance)
    flags = {"need_slope": need_slope, "need_dvariance": need_dvariance}
    if variance.shape[-1] < SERIES_MIN_LATENT or variance.dtype == torch.float64:
        return _spread_quadrature(offset2, variance, exponent, scale, **flags), found
    term = series(offset2, found, exponent, scale, **flags)
    is_far = (found.r2 > SERIES_MAX_R2).any(1)  # [R]
    if variance.device.type == "cpu":
        far = is_far.nonzero()[:, 0]
        if far.numel():
            exact = _spread_quadrature(offset2[far], variance[far], exponent, scale[far], **flags)
            for whole, part in zip(term, exact, strict=True):
                if whole is not None and part is not None:
                    whole[far] = part
        return term, found
    exact = _spread_quadrature(offset2, variance, exponent, scale, **flags)
    chosen = [
        None
        if whole is None or part is None
        else torch.where(is_far.view(-1, *[1] * (part.dim() - 1)), part, whole)
        for whole, part in zip(term, exact, strict=True)
    ]
    return GaussianTerm(*chosen), found  # type: ignore[arg-type]


def _spread_quadrature(
    offset2: Tensor, variance: Tensor, exponent: float, scale: Tensor, **flags: bool
) -> GaussianTerm:
    """`quadrature`, with nodes of their own for samples whose E|v|² differ too much to share them."""
    num_rows, num_samples, width = offset2.shape
    mean_square = offset2.sum(-1) + variance.sum(-1, keepdim=True)
    can_share = variance.device.type == "cpu" and bool(
        (mean_square.amax(1) <= MAX_SPREAD * mean_square.amin(1)).all()
    )
    if can_share:
        return quadrature(offset2, variance, exponent, scale, **flags)
    term = quadrature(
        offset2.reshape(-1, 1, width),
        variance.repeat_interleave(num_samples, 0),
        exponent,
        scale.repeat_interleave(num_samples, 0),
        **flags,
    )
    shape = (num_rows, num_samples, width)
    return GaussianTerm(
        term.value.view(num_rows, num_samples),
        None if term.slope is None else term.slope.view(shape),
        None if term.dvariance is None else term.dvariance.view(shape).sum(1),
    )


def expected_distance(offset: Tensor, std: Tensor, exponent: float, method: str) -> Tensor:
    """E|v|^α of v ~ N(offset, std²), both ``[R, L]``."""
    dtype = _compute_dtype(offset, std)

    def run(needs: Needs) -> tuple[Outputs, Outputs]:
        def compute(rows: slice) -> Outputs:
            scale, m, s = _load(rows, None, dtype, offset, std)
            offset2, variance = (m * m)[:, None], s * s
            flags = {"need_slope": needs[0], "need_dvariance": needs[1]}
            if method == "auto":
                term, _ = gaussian_term(offset2, variance, exponent, scale, **flags)
            elif method == "series":
                found = moments(offset2, variance)
                term = series(offset2, found, exponent, scale, **flags)
            else:
                term = quadrature(offset2, variance, exponent, scale, **flags)
            doffset = None if term.slope is None else term.slope[:, 0] * m
            dstd = None if term.dvariance is None else term.dvariance * s * 2
            return term.value[:, 0], doffset, dstd

        value, *gradients = _in_chunks(compute, offset.shape[0], num_nodes(dtype) * offset.shape[1])
        return (value,), tuple(gradients)

    return _differentiate(run, offset, std)[0]  # type: ignore[return-value]
