"""The score as custom ops, for autograd and torch.compile.

One launch computes the score together with every gradient that is needed. The gradients are outputs
of the op, and backward multiplies them by the upstream gradient of each position. Of the outputs
only the score is differentiated.
"""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.energy_score.analytic_kernels import analytic_score
from calm_kernels.energy_score.direct_kernels import direct_drawn_score, direct_given_score
from calm_kernels.energy_score.gram_kernels import gram_score, takes_gram
from calm_kernels.energy_score.problem import Problem
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.noise import as_first_row
from calm_kernels.operators import operator

__all__ = ["energy_score_triton", "gaussian_energy_score_triton"]

Gradients = tuple[Tensor | None, ...]


def energy_score_triton(
    samples: Tensor, targets: Tensor, exponent: float, weight: Tensor | None
) -> Tensor:
    """Score ``[R]`` of samples ``[N, R, L]`` against given targets ``[M, R, L]``."""
    score, *_ = _given_op(samples, targets, weight, exponent, *_needs(samples, targets))
    return score


def gaussian_energy_score_triton(
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
    needs = _needs(samples, mean, log_std)
    options = (exponent, needs[0], needs[1] or needs[2])
    if draws is None:
        score, terms, *_ = _analytic_op(samples, mean, log_std, weight, *options)
        fidelity, diversity, max_r2 = terms.unbind()
        return score, fidelity, diversity, max_r2
    first_row = as_first_row(draws.first_row, samples.device)
    seed = None if draws.seed is None else draws.seed.contiguous()
    score, terms, *_ = _drawn_op(
        samples, mean, log_std, weight, draws.noise, seed, first_row, draws.num_targets,
        draws.is_antithetic, *options,
    )  # fmt: skip
    fidelity, diversity, _ = terms.unbind()
    return score, fidelity, diversity, None


def _needs(*inputs: Tensor) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)


def _outputs(samples: Tensor, need_samples: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Score ``[R]``, terms ``[3, R]`` and the samples' gradient ``[R, N, L]``, empty if not needed.

    For float16 it is float32: float16 would lose small values before a loss scale multiplies them.
    """
    num_samples, num_rows, width = samples.shape
    score = samples.new_empty(num_rows, dtype=torch.float32)
    terms = samples.new_empty(3, num_rows, dtype=torch.float32)
    dtype = torch.float32 if samples.dtype == torch.float16 else samples.dtype
    shape = (num_rows, num_samples, width) if need_samples else (0,)
    return score, terms, samples.new_empty(shape, dtype=dtype)


def _posterior_outputs(mean: Tensor, log_std: Tensor, is_needed: bool) -> tuple[Tensor, Tensor]:
    """Gradients of mean and log_std in float32, empty if not needed."""
    shape = mean.shape if is_needed else (0,)
    return mean.new_empty(shape, dtype=torch.float32), log_std.new_empty(shape, dtype=torch.float32)


def _target_output(samples: Tensor, targets: Tensor, is_needed: bool) -> Tensor:
    """Gradient of given targets ``[R, M, L]`` in float32, empty if not needed."""
    num_targets, num_rows, width = targets.shape
    shape = (num_rows, num_targets, width) if is_needed else (0,)
    return targets.new_empty(shape, dtype=torch.float32)


@operator("energy_score")
def _given_op(
    samples: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score, terms, gradients of samples ``[R, N, L]`` and of targets ``[R, M, L]`` in float32."""
    score, terms, dsamples = _outputs(samples, need_samples)
    dtargets = _target_output(samples, targets, need_targets)
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=False
        )
        direct_given_score(
            problem, samples, targets, weight, score, terms, dsamples, dtargets,
            need_targets=need_targets,
        )  # fmt: skip
    return score, terms, dsamples, dtargets


@operator("analytic_energy_score")
def _analytic_op(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_posterior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, terms and the gradients of samples ``[R, N, L]``, mean and log_std ``[R, L]``."""
    score, terms, dsamples = _outputs(samples, need_samples)
    dmean, dlog_std = _posterior_outputs(mean, log_std, need_posterior)
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=need_posterior
        )
        analytic_score(
            problem, samples, mean, log_std, weight, score, terms, dsamples, dmean, dlog_std
        )
    return score, terms, dsamples, dmean, dlog_std


@operator("drawn_energy_score")
def _drawn_op(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    weight: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    first_row: Tensor,
    num_targets: int,
    is_antithetic: bool,
    exponent: float,
    need_samples: bool,
    need_posterior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_analytic_op` for targets drawn from a seed, or from given noise ``[M, R, L]``."""
    score, terms, dsamples = _outputs(samples, need_samples)
    dmean, dlog_std = _posterior_outputs(mean, log_std, need_posterior)
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=need_posterior
        )
        draws = TargetDraws(noise, num_targets, seed, first_row, is_antithetic)
        has_gram = noise is None and takes_gram(problem)
        launch = gram_score if has_gram else direct_drawn_score
        launch(
            problem, samples, mean, log_std, weight, draws, score, terms, dsamples, dmean, dlog_std
        )
    return score, terms, dsamples, dmean, dlog_std


@_given_op.register_fake
def _(
    samples: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_outputs(samples, need_samples), _target_output(samples, targets, need_targets)


@_analytic_op.register_fake
@_drawn_op.register_fake
def _(samples: Tensor, mean: Tensor, log_std: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, need_samples, need_posterior = options
    return *_outputs(samples, need_samples), *_posterior_outputs(mean, log_std, need_posterior)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the launch stored."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the other outputs: zeros that nobody reads
    ctx.save_for_backward(*output[2:])
    ctx.num_inputs = len(inputs)
    ctx.dtypes = [value.dtype for value in inputs[: len(output) - 2]]


def _scale_gradients(ctx: Any, dscore: Tensor, *_: None) -> Gradients:
    """Stored gradients ``[R, ...]`` times upstream ``[R]``, with draws as the first axis; None
    where no gradient was stored.
    """
    refuse_second_derivative("the energy score", advice="")
    scaled: list[Tensor | None] = []
    for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
        if gradient.dim() == 1:
            scaled.append(None)
            continue
        upstream = dscore.view(-1, *[1] * (gradient.dim() - 1))
        total = torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
        scaled.append(total.transpose(0, 1) if gradient.dim() == 3 else total)
    return *scaled, *[None] * (ctx.num_inputs - len(scaled))


for _operator in (_given_op, _analytic_op, _drawn_op):
    _operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
