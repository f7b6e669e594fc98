"""Launches the energy score's kernels and teaches autograd and torch.compile about them.

One launch computes the score together with every gradient that is needed; the gradients are outputs of the operator,
and backward multiplies them by the upstream gradient of each patch.
"""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.energy_score.direct_kernels import direct_kernel
from calm_kernels.energy_score.expectation import SERIES_MIN_LATENT
from calm_kernels.energy_score.kernels import analytic_kernel
from calm_kernels.energy_score.nodes import nodes
from calm_kernels.energy_score.series import MAX_R2, MAX_SHARE
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.tuning import architecture, launch_options, patch_tile, setting, use_fast_math

__all__ = ["energy_score", "gaussian_energy_score"]


Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def energy_score(
    samples: Tensor, targets: Tensor, exponent: float, weight: Tensor | None
) -> Tensor:
    """Score ``[R]`` of samples ``[N, R, L]`` against given targets ``[M, R, L]``."""
    terms, *_ = _energy_score(samples, targets, weight, exponent, *_needs(samples, targets))
    return terms[0]


def gaussian_energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    exponent: float,
    draws: TargetDraws | None,
    weight: Tensor | None,
) -> Outputs:
    """Score, fidelity, diversity and largest r2 ``[R]`` of samples ``[N, R, L]`` against N(mean, exp(log_std)²)."""
    needs = _needs(samples, mean, log_std)
    options = (exponent, needs[0], needs[1] or needs[2])
    if draws is None:
        terms, *_ = _analytic(samples, mean, log_std, weight, *options)
    else:
        first_row = draws.first_row
        if draws.seed is not None and not isinstance(first_row, Tensor):
            first_row = torch.full((), first_row, dtype=torch.int64, device=samples.device)
        terms, *_ = _drawn(
            samples, mean, log_std, weight, draws.noise, draws.seed,
            first_row if isinstance(first_row, Tensor) else None, draws.num_targets,
            draws.is_antithetic, *options,
        )  # fmt: skip
    return terms[0], terms[1], terms[2], terms[3] if draws is None else None


def _needs(*inputs: Tensor) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)


def _allocate(samples: Tensor, need_samples: bool) -> tuple[Tensor, Tensor]:
    """Terms ``[4, R]`` and the gradient of the samples in patch-major memory ``[R, N, L]``, empty if not needed."""
    num_samples, num_rows, width = samples.shape
    terms = samples.new_empty(4, num_rows, dtype=torch.float32)
    shape = (num_rows, num_samples, width) if need_samples else (0,)
    return terms, samples.new_empty(shape)


def _posterior_gradients(mean: Tensor, log_std: Tensor, is_needed: bool) -> tuple[Tensor, Tensor]:
    shape = mean.shape if is_needed else (0,)
    return mean.new_empty(shape), log_std.new_empty(shape)


def _geometry(operation: str, samples: Tensor) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile constants and compiler options for these samples."""
    num_samples, _, width = samples.shape
    launch = setting(operation, architecture(samples.device), width)
    tile = patch_tile(launch, num_samples, width, samples.element_size())
    return tile.constants(), launch_options(launch, tile.num_warps)


def _weight_arguments(weight: Tensor | None, samples: Tensor) -> tuple[Tensor, int]:
    """A tensor to point at and its stride; the kernel does not read it without a weight."""
    return (samples, 0) if weight is None else (weight, weight.stride(0))


@torch.library.custom_op("calm_kernels::energy_score", mutates_args=())
def _energy_score(
    samples: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, the gradient of the samples ``[R, N, L]`` and of the targets ``[R, M, L]`` (float32)."""
    terms, dsamples = _allocate(samples, need_samples)
    num_targets, num_rows, width = targets.shape
    dtargets = targets.new_empty(
        (num_rows, num_targets, width) if need_targets else (0,), dtype=torch.float32
    )
    if num_rows:
        pointer, stride = _weight_arguments(weight, samples)
        constants, options = _geometry("energy_score.direct", samples)
        with torch.cuda.device_of(samples):
            direct_kernel[(num_rows,)](
                samples, targets, samples, samples, pointer, samples, samples, terms,
                dsamples, dtargets, samples, samples, num_rows, num_targets, num_targets,
                samples.stride(0), samples.stride(1), samples.stride(2),
                targets.stride(0), targets.stride(1), targets.stride(2), 0, 0, 0, 0, stride, 0,
                samples.shape[0], width, exponent, True, False, False, need_samples, need_targets,
                False, weight is not None, **constants, FAST=use_fast_math(), **options,
            )  # fmt: skip
    return terms, dsamples, dtargets


@torch.library.custom_op("calm_kernels::analytic_energy_score", mutates_args=())
def _analytic(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_posterior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Terms and the gradients of samples ``[R, N, L]``, mean and log_std ``[R, L]``."""
    terms, dsamples = _allocate(samples, need_samples)
    dmean, dlog_std = _posterior_gradients(mean, log_std, need_posterior)
    num_samples, num_rows, width = samples.shape
    if num_rows:
        rule = nodes(exponent, width)
        max_excess = 1.0 if width >= SERIES_MIN_LATENT else -1.0
        pointer, stride = _weight_arguments(weight, samples)
        constants, options = _geometry("energy_score.analytic", samples)
        with torch.cuda.device_of(samples):
            analytic_kernel[(num_rows,)](
                samples, mean, log_std, pointer, terms, dsamples, dmean, dlog_std, num_rows,
                samples.stride(0), samples.stride(1), samples.stride(2), mean.stride(0),
                mean.stride(1), log_std.stride(0), log_std.stride(1), stride, rule.first,
                rule.step, rule.log_scale, num_samples, width, exponent, rule.count, MAX_R2,
                MAX_SHARE, max_excess, need_samples, need_posterior, weight is not None, **constants,
                FAST=use_fast_math(), **options,
            )  # fmt: skip
    return terms, dsamples, dmean, dlog_std


@torch.library.custom_op("calm_kernels::drawn_energy_score", mutates_args=())
def _drawn(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    first_row: Tensor | None,
    num_targets: int,
    is_antithetic: bool,
    exponent: float,
    need_samples: bool,
    need_posterior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_analytic` for targets drawn from a seed, or from given noise ``[M, R, L]``."""
    terms, dsamples = _allocate(samples, need_samples)
    dmean, dlog_std = _posterior_gradients(mean, log_std, need_posterior)
    num_samples, num_rows, width = samples.shape
    if num_rows:
        pointer, stride = _weight_arguments(weight, samples)
        strides = (0, 0, 0) if noise is None else noise.stride()
        is_shared = seed is None or seed.dim() == 1
        constants, options = _geometry("energy_score.direct", samples)
        with torch.cuda.device_of(samples):
            direct_kernel[(num_rows,)](
                samples, samples if noise is None else noise, mean, log_std, pointer,
                samples if seed is None else seed, samples if first_row is None else first_row,
                terms, dsamples, samples, dmean, dlog_std, num_rows, num_targets,
                num_targets // 2 if is_antithetic else num_targets, samples.stride(0),
                samples.stride(1), samples.stride(2), *strides, mean.stride(0), mean.stride(1),
                log_std.stride(0), log_std.stride(1), stride, 0 if is_shared else seed.stride(0),
                num_samples, width, exponent, False, noise is None, is_antithetic, need_samples,
                False, need_posterior, weight is not None, **constants, FAST=use_fast_math(),
                **options,
            )  # fmt: skip
    return terms, dsamples, dmean, dlog_std


@_energy_score.register_fake
def _(samples, targets, weight, exponent, need_samples, need_targets):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    num_targets, num_rows, width = targets.shape
    shape = (num_rows, num_targets, width) if need_targets else (0,)
    return *_allocate(samples, need_samples), targets.new_empty(shape, dtype=torch.float32)


@_analytic.register_fake
@_drawn.register_fake
def _(samples, mean, log_std, *options):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    *_, need_samples, need_posterior = options
    return *_allocate(samples, need_samples), *_posterior_gradients(mean, log_std, need_posterior)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the launch stored; only the score (row 0 of the terms) is differentiated."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.num_inputs = len(inputs)
    ctx.target_dtype = inputs[1].dtype


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Stored gradient ``[R, ...]`` times upstream ``[R]``; None where none was stored."""
    if gradient.dim() == 1:
        return None
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, upstream.view(-1, *[1] * (gradient.dim() - 1)), out=out)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the Triton energy score is differentiable once: create_graph=True is not supported; "
            'use backend="reference" for gradients of gradients'
        )


def _backward_given(ctx: Any, dterms: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    dsamples, dtargets = (
        _scaled(gradient, dterms[0], dtype)
        for gradient, dtype in zip(
            ctx.saved_tensors, (ctx.saved_tensors[0].dtype, ctx.target_dtype), strict=True
        )
    )
    by_draw = [None if g is None else g.transpose(0, 1) for g in (dsamples, dtargets)]
    return *by_draw, *[None] * (ctx.num_inputs - 2)


def _backward_gaussian(ctx: Any, dterms: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    dsamples, dmean, dlog_std = (_scaled(g, dterms[0], g.dtype) for g in ctx.saved_tensors)
    by_draw = None if dsamples is None else dsamples.transpose(0, 1)
    return by_draw, dmean, dlog_std, *[None] * (ctx.num_inputs - 3)


_energy_score.register_autograd(_backward_given, setup_context=_save_gradients)
_analytic.register_autograd(_backward_gaussian, setup_context=_save_gradients)
_drawn.register_autograd(_backward_gaussian, setup_context=_save_gradients)
