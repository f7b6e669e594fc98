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
    samples: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    exponent: float,
    weight: Tensor | None,
) -> Tensor:
    """Score ``[R]`` of samples ``[N, R, L]`` against given targets ``[M, R, L]``, weights
    ``[M, R]``.
    """
    needs = _needs(samples, targets, target_weights)
    score, *_ = _given_op(samples, targets, target_weights, weight, exponent, *needs)
    return score


def gaussian_energy_score_triton(
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
    needs = _needs(samples, mean, log_std, target_weights)
    options = (exponent, needs[0], needs[1] or needs[2])
    if draws is None:
        score, terms, *_ = _analytic_op(
            samples, mean, log_std, target_weights, weight, *options, needs[3]
        )
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


def _needs(*inputs: Tensor | None) -> tuple[bool, ...]:
    has_graph = torch.is_grad_enabled()
    return tuple(has_graph and tensor is not None and tensor.requires_grad for tensor in inputs)


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


def _target_output(samples: Tensor, targets: Tensor | None, is_needed: bool) -> Tensor:
    """Gradient in float32 of what targets have, ``[M, R, ...]``: ``[R, M, ...]``, empty if not
    needed.
    """
    shape: tuple[int, ...] = (0,)
    if targets is not None and is_needed:
        num_targets, num_rows, *features = targets.shape
        shape = (num_rows, num_targets, *features)
    return samples.new_empty(shape, dtype=torch.float32)


@operator("energy_score")
def _given_op(
    samples: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_targets: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, terms, gradients of samples ``[R, N, L]`` and, in float32, of targets ``[R, M, L]``
    and their weights ``[R, M]``.
    """
    score, terms, dsamples = _outputs(samples, need_samples)
    dtargets = _target_output(samples, targets, need_targets)
    dweights = _target_output(samples, target_weights, need_weights)
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=False,
            target_weights=target_weights, need_target_weights=need_weights,
        )  # fmt: skip
        direct_given_score(
            problem, samples, targets, target_weights, weight, score, terms, dsamples, dtargets,
            dweights, need_targets=need_targets,
        )  # fmt: skip
    return score, terms, dsamples, dtargets, dweights


@operator("analytic_energy_score")
def _analytic_op(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    target_weights: Tensor | None,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_posterior: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, terms and the gradients of samples ``[R, N, L]``, mean and log_std ``[R, G, L]``, and
    the weights ``[R, G]``.
    """
    score, terms, dsamples = _outputs(samples, need_samples)
    dmean, dlog_std = (_target_output(samples, v, need_posterior) for v in (mean, log_std))
    dweights = _target_output(samples, target_weights, need_weights)
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=need_posterior,
            target_weights=target_weights, need_target_weights=need_weights,
        )  # fmt: skip
        analytic_score(
            problem, samples, mean, log_std, target_weights, weight, score, terms, dsamples, dmean,
            dlog_std, dweights,
        )  # fmt: skip
    return score, terms, dsamples, dmean, dlog_std, dweights


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
    """As `_analytic_op` for targets drawn from a seed, or from given noise ``[M, R, L]``, of one
    Gaussian ``[1, R, L]``.
    """
    score, terms, dsamples = _outputs(samples, need_samples)
    dmean, dlog_std = (_target_output(samples, v, need_posterior) for v in (mean, log_std))
    if samples.shape[1]:
        problem = Problem.of(
            samples, weight, exponent, need_samples=need_samples, need_posterior=need_posterior
        )
        draws = TargetDraws(noise, num_targets, seed, first_row, is_antithetic)
        has_gram = noise is None and takes_gram(problem)
        launch = gram_score if has_gram else direct_drawn_score
        launch(
            problem, samples, mean[0], log_std[0], weight, draws, score, terms, dsamples, dmean,
            dlog_std,
        )  # fmt: skip
    return score, terms, dsamples, dmean, dlog_std


@_given_op.register_fake
def _(
    samples: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    weight: Tensor | None,
    exponent: float,
    need_samples: bool,
    need_targets: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    return (
        *_outputs(samples, need_samples),
        _target_output(samples, targets, need_targets),
        _target_output(samples, target_weights, need_weights),
    )


@_analytic_op.register_fake
def _(
    samples: Tensor, mean: Tensor, log_std: Tensor, target_weights: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    *_, need_samples, need_posterior, need_weights = options
    return (
        *_outputs(samples, need_samples),
        *(_target_output(samples, value, need_posterior) for value in (mean, log_std)),
        _target_output(samples, target_weights, need_weights),
    )


@_drawn_op.register_fake
def _(samples: Tensor, mean: Tensor, log_std: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, need_samples, need_posterior = options
    return (
        *_outputs(samples, need_samples),
        *(_target_output(samples, value, need_posterior) for value in (mean, log_std)),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the launch stored."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of the other outputs: zeros that nobody reads
    ctx.save_for_backward(*output[2:])
    ctx.num_inputs = len(inputs)
    ctx.dtypes = [None if value is None else value.dtype for value in inputs[: len(output) - 2]]


def _scale_gradients(ctx: Any, dscore: Tensor, *_: None) -> Gradients:
    """Stored gradients ``[R, M, ...]`` times upstream ``[R]``, as ``[M, R, ...]``; None where no
    gradient was stored.
    """
    refuse_second_derivative("the energy score", advice="")
    scaled: list[Tensor | None] = []
    for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
        if gradient.dim() == 1:
            scaled.append(None)
            continue
        upstream = dscore.view(-1, *[1] * (gradient.dim() - 1))
        total = torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
        scaled.append(total.transpose(0, 1))
    return *scaled, *[None] * (ctx.num_inputs - len(scaled))


for _operator in (_given_op, _analytic_op, _drawn_op):
    _operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
