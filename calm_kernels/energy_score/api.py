"""The public functions: check the arguments, choose the backend, call it."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import (
    check_device,
    check_dtype,
    check_exponent,
    check_integer,
    check_shape,
    check_tensor,
)
from calm_kernels.energy_score.eager import (
    energy_score_eager,
    expected_distance_eager,
    gaussian_energy_score_eager,
)
from calm_kernels.energy_score.reference import (
    energy_score_reference,
    gaussian_energy_score_reference,
)
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.noise import Seed, as_seed

__all__ = [
    "EnergyScoreDiagnostics",
    "energy_score",
    "expected_distance",
    "gaussian_energy_score",
]

Targets = Literal["analytic", "antithetic", "sample"]
Method = Literal["auto", "series", "quadrature"]
TARGETS, METHODS = get_args(Targets), get_args(Method)
# A position of this latent size fits into the registers of a program.
TRITON_MAX_LATENT = 1024


class EnergyScoreDiagnostics(NamedTuple):
    """The terms of the score = diversity - fidelity, weighted as the score is; constants."""

    fidelity: Tensor  # [...]: 2 · mean E|x - y|^α
    diversity: Tensor  # [...]: mean_{i≠j} |x_i - x_j|^α
    # [...]: largest relative variance of |x - y|², 0 where the weight is; None for drawn targets
    max_r2: Tensor | None


def energy_score(
    samples: Tensor,
    targets: Tensor,
    *,
    exponent: float = 1.0,
    weight: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Unbiased energy score of a set of samples against given targets; higher is better.

    score = mean_{i≠j} |x_i - x_j|^α  -  2 · mean_{i,m} |x_i - y_m|^α

    Args:
        samples: model draws x, ``[N, ..., L]``, N >= 2, fp64 / fp32 / bf16 / fp16, any strides.
        targets: draws y of the distribution to match, ``[M, ..., L]``, M >= 1, same device.
        exponent: α, with 0 < α < 2.
        weight: ``[...]``, multiplies each position's score; a constant. A position of weight 0
            scores 0 with gradient 0 whatever its inputs hold.
        backend: see `calm_kernels.backend`.

    Returns: ``[...]`` in fp32, fp64 if an input is fp64. Differentiable once in samples, targets;
        the gradient is finite when points coincide (that of |v|^α at v = 0 is 0).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or exponent.

    Source: CALM, equations 9 and 10. Cost: N(N + M) distances a position; no ``[N, M, ..., L]``
        array.
    """
    _check_samples(samples)
    check_tensor("targets", targets, min_dim=2)
    check_dtype("targets", targets)
    check_device("targets", targets, "samples", samples)
    check_shape("targets", targets, (targets.shape[0], *samples.shape[1:]), "that of samples")
    if targets.shape[0] < 1:
        raise ValueError("targets must hold at least 1 draw, got 0")
    _check_weight(weight, samples)
    exponent = check_exponent(exponent)
    flat_weight = None if weight is None else weight.reshape(-1)
    arguments = (_by_rows(samples), _by_rows(targets), exponent, flat_weight)
    obstacle = _obstacle(samples, targets)
    match resolve(backend, "energy_score", samples, obstacle=obstacle):
        case Backend.REFERENCE:
            score = energy_score_reference(*arguments)
        case Backend.TRITON:
            from calm_kernels.energy_score.function import energy_score_triton

            score = energy_score_triton(*arguments)
        case _:
            score = energy_score_eager(*arguments)
    return score.view(samples.shape[1:-1])


def gaussian_energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    exponent: float = 1.0,
    targets: Targets = "analytic",
    num_targets: int = 100,
    target_noise: Tensor | None = None,
    weight: Tensor | None = None,
    seed: Seed = None,
    first_row: int | Tensor = 0,
    return_diagnostics: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Any:
    """Unbiased energy score of a set of samples against a diagonal Gaussian; higher is better.

    score = mean_{i≠j} |x_i - x_j|^α  -  2 · mean_i E|x_i - y|^α,    y ~ N(mean, exp(log_std)²)

    Args:
        samples: model draws x, ``[N, ..., L]``, N >= 2, fp64 / fp32 / bf16 / fp16, any strides; a
            view of memory ``[..., N, L]`` is the fastest.
        mean: ``[..., L]``.
        log_std: ``[..., L]``.
        exponent: α, with 0 < α < 2.
        targets: how the expectation over y is found. ``"analytic"``: exactly, by a series where
            |x - y|² varies little and by quadrature elsewhere; no draws. ``"sample"``: as the mean
            over `num_targets` draws, shared by the samples, as published. ``"antithetic"``: the
            same with draws in pairs ±ε, for an even `num_targets`: unbiased, with less noise.
        num_targets: M, draws a position (default: the published 100).
        target_noise: draws to use, ``[M, ..., L]``; the axes between hold one row per position in
            row-major order. Given, y = mean + exp(log_std) · target_noise whatever `targets` says.
        weight: ``[...]``, multiplies each position's score; a constant. A position of weight 0
            scores 0 with gradient 0 whatever its inputs hold.
        seed: see `calm_kernels.noise.as_seed`, one seed a position included. Unused without draws.
        first_row: global row index of the first position: any split of a batch draws the same
            noise.
        return_diagnostics: return the two terms too.
        backend: see `calm_kernels.backend`.

    Returns: ``[...]`` in fp32, fp64 if an input is fp64; with `return_diagnostics` a pair of it and
        `EnergyScoreDiagnostics`. Differentiable once in samples, mean and log_std; gradients are
        finite when points coincide (that of |v|^α at v = 0 is 0) and when a variance is 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, exponent, number of targets or seed.

    Source: CALM, equations 9 and 10; the exact expectation is this library's own.

    Cost: N(N-1)/2 distances a position; for the targets about as much again with the series, ten
        times that with quadrature, N·M distances for draws. No ``[N, M, ..., L]`` array.
    """
    _check_samples(samples)
    batch = samples.shape[1:]
    for name, value in (("mean", mean), ("log_std", log_std)):
        check_tensor(name, value, min_dim=1)
        check_dtype(name, value)
        check_shape(name, value, batch, "samples without their first axis")
        check_device(name, value, "samples", samples)
    _check_weight(weight, samples)
    exponent = check_exponent(exponent)
    draws = _draws(samples, targets, num_targets, target_noise, seed, first_row)

    flat_mean, flat_weight = _rows(mean), None if weight is None else weight.reshape(-1)
    arguments = (_by_rows(samples), flat_mean, _rows(log_std), exponent)
    obstacle = _obstacle(samples, mean, log_std)
    match resolve(backend, "gaussian_energy_score", samples, obstacle=obstacle):
        case Backend.REFERENCE:
            drawn = None if draws is None else draws.all(*flat_mean.shape)
            terms = gaussian_energy_score_reference(*arguments, drawn, flat_weight)
        case Backend.TRITON:
            from calm_kernels.energy_score.function import gaussian_energy_score_triton

            terms = gaussian_energy_score_triton(*arguments, draws, flat_weight)
        case _:
            terms = gaussian_energy_score_eager(*arguments, draws, flat_weight)
    score, fidelity, diversity, max_r2 = terms
    score = score.view(batch[:-1])
    if not return_diagnostics:
        return score
    return score, EnergyScoreDiagnostics(
        fidelity.detach().view(batch[:-1]),
        diversity.detach().view(batch[:-1]),
        None if max_r2 is None else max_r2.detach().view(batch[:-1]),
    )


def expected_distance(
    offset: Tensor, std: Tensor, exponent: float = 1.0, *, method: Method = "auto"
) -> Tensor:
    """E|v|^α of v ~ N(offset, diag std²), exact: the target term of the analytic energy score.

    Args:
        offset: ``[..., L]``, fp64 / fp32 / bf16 / fp16.
        std: ``[..., L]``, same device; its sign does not matter.
        exponent: α, with 0 < α < 2.
        method: ``"series"``, ``"quadrature"``, or ``"auto"``: in fp32 for L >= 32 the series where
            it is accurate (see `calm_kernels.energy_score.series`), quadrature elsewhere.

    Returns: ``[...]`` in fp32, fp64 if an input is fp64. Differentiable once in both.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, exponent or method.

    Accuracy: relative error at most 3e-6 in fp32, 1e-10 in fp64 (``"series"``: as far as it goes).
    """
    check_tensor("offset", offset, min_dim=1)
    check_dtype("offset", offset)
    check_tensor("std", std, min_dim=1)
    check_dtype("std", std)
    check_shape("std", std, offset.shape, "that of offset")
    check_device("std", std, "offset", offset)
    exponent = check_exponent(exponent)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    return expected_distance_eager(_rows(offset), _rows(std), exponent, method).view(
        offset.shape[:-1]
    )


def _obstacle(*inputs: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, None if they can."""
    if any(value.dtype == torch.float64 for value in inputs):
        return "computes in float32 and takes no float64 input"
    if inputs[0].shape[-1] > TRITON_MAX_LATENT:
        return f"takes latent sizes up to {TRITON_MAX_LATENT}, got {inputs[0].shape[-1]}"
    return None


def _by_rows(points: Tensor) -> Tensor:
    """``[N, ..., L]`` as ``[N, R, L]``, a view where strides allow."""
    return points[:, None] if points.dim() == 2 else points.flatten(1, -2)


def _rows(parameter: Tensor) -> Tensor:
    """``[..., L]`` as ``[R, L]``."""
    return parameter[None] if parameter.dim() == 1 else parameter.flatten(0, -2)


def _check_samples(samples: Tensor) -> None:
    check_tensor("samples", samples, min_dim=2)
    check_dtype("samples", samples)
    if samples.shape[0] < 2:
        raise ValueError(
            "samples must hold at least 2 draws along the first axis (the score compares pairs), "
            f"got shape {tuple(samples.shape)}"
        )
    if samples.shape[-1] < 1:
        raise ValueError(f"samples must have latent size >= 1, got shape {tuple(samples.shape)}")


def _check_weight(weight: Tensor | None, samples: Tensor) -> None:
    if weight is None:
        return
    check_tensor("weight", weight)
    check_dtype("weight", weight)
    check_shape("weight", weight, samples.shape[1:-1], "the positions of samples")
    check_device("weight", weight, "samples", samples)
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: it is a constant of the score")


def _draws(
    samples: Tensor,
    targets: str,
    num_targets: int,
    noise: Tensor | None,
    seed: Seed,
    first_row: int | Tensor,
) -> TargetDraws | None:
    """Where the targets come from; None for the exact expectation."""
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {', '.join(TARGETS)}; got {targets!r}")
    check_integer("num_targets", num_targets, 1)
    if noise is not None:
        return TargetDraws(_noise_by_rows(noise, samples), noise.shape[0])
    if targets == "analytic":
        return None
    is_antithetic = targets == "antithetic"
    if is_antithetic and num_targets % 2:
        raise ValueError(f'num_targets must be even for targets="antithetic", got {num_targets}')
    found = as_seed(seed, samples.device)
    rows = samples[0, ..., 0].numel()
    if found.dim() == 2 and found.shape[0] != rows:
        raise ValueError(f"seed must have one row per position, {rows}; got {found.shape[0]}")
    return TargetDraws(None, num_targets, found, first_row, is_antithetic)


def _noise_by_rows(noise: Tensor, samples: Tensor) -> Tensor:
    """Given draws ``[M, ..., L]`` as ``[M, R, L]``; only the number of rows counts."""
    check_tensor("target_noise", noise, min_dim=2)
    check_dtype("target_noise", noise)
    check_device("target_noise", noise, "samples", samples)
    rows, width = samples[0, ..., 0].numel(), samples.shape[-1]
    by_rows = _by_rows(noise)
    if noise.shape[0] < 1 or tuple(by_rows.shape[1:]) != (rows, width):
        raise ValueError(
            f"target_noise must have shape [M, ..., {width}] with M >= 1 and {rows} rows between, "
            f"got {tuple(noise.shape)}"
        )
    return by_rows
