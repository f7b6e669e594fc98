"""The public functions: check the arguments, choose the backend, call it."""

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import (
    check_device,
    check_dtype,
    check_exponent,
    check_shape,
    check_tensor,
)
from calm_kernels.energy_score.arguments import (
    Targets,
    by_rows,
    check_samples,
    check_target_weights,
    check_weight,
    components,
    draws_of,
    flat,
    obstacle,
    rows,
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
from calm_kernels.noise import Seed

__all__ = [
    "EnergyScoreDiagnostics",
    "energy_score",
    "expected_distance",
    "gaussian_energy_score",
]

Method = Literal["auto", "series", "quadrature"]
METHODS = get_args(Method)


class EnergyScoreDiagnostics(NamedTuple):
    """The terms of the score = diversity - fidelity, weighted as the score is; constants."""

    fidelity: Tensor  # [...]: 2 · mean E|x - y|^α, of a mixture Σ_g w_g of these
    diversity: Tensor  # [...]: mean_{i≠j} |x_i - x_j|^α
    # [...]: largest relative variance of |x - y|², 0 where the weight is; None for drawn targets
    max_r2: Tensor | None


def energy_score(
    samples: Tensor,
    targets: Tensor,
    *,
    exponent: float = 1.0,
    target_weights: Tensor | None = None,
    weight: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Unbiased energy score of a set of samples against given targets; higher is better.

    score = mean_{i≠j} |x_i - x_j|^α  -  2 · Σ_m w_m mean_i |x_i - y_m|^α,    w_m = 1/M

    Args:
        samples: model draws x, ``[N, ..., L]``, N >= 2, fp64 / fp32 / bf16 / fp16, any strides.
        targets: draws y of the distribution to match, ``[M, ..., L]``, M >= 1, same device.
        exponent: α, with 0 < α < 2.
        target_weights: w in place of 1/M, ``[M, ...]``, any real numbers, taken as they are. With
            w >= 0 and Σ w = 1 the score is proper, and its expectation greatest where the samples
            have the distribution Σ w_m δ(y_m). Negative weights with Σ w = 1 keep it bounded: it is
            greatest at the distribution nearest, in energy distance, to the signed measure w. With
            Σ w > 1 the best samples are narrower than the target; with Σ w < 1 there are none:
            samples gain without end by a few of them running away. A target of weight 0 may
            hold anything, as padding, unless the weights need a gradient.
        weight: ``[...]``, multiplies each position's score; a constant. A position of weight 0
            scores 0 with gradient 0 whatever its inputs hold.
        backend: see `calm_kernels.backend`.

    Returns: ``[...]`` in fp32, fp64 if samples or targets are fp64. Differentiable once in samples,
        targets and target_weights; the gradient is finite when points coincide (that of |v|^α at
        v = 0 is 0).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or exponent; on a CPU, weights that sum
            to zero at a position whose `weight` is not 0 (elsewhere a look would synchronise).

    Source: CALM, equations 9 and 10; linear in the target's distribution. Cost: N(N + M) distances
        a position; no ``[N, M, ..., L]`` array.
    """
    check_samples(samples)
    check_tensor("targets", targets, min_dim=2)
    check_dtype("targets", targets)
    check_device("targets", targets, "samples", samples)
    check_shape("targets", targets, (targets.shape[0], *samples.shape[1:]), "that of samples")
    if targets.shape[0] < 1:
        raise ValueError("targets must hold at least 1 draw, got 0")
    check_weight(weight, samples)
    check_target_weights(target_weights, samples, weight, targets.shape[0])
    exponent = check_exponent(exponent)
    positions = samples.shape[1:-1]
    arguments = (
        by_rows(samples),
        by_rows(targets),
        flat(target_weights, len(positions)),
        exponent,
        flat(weight, len(positions)),
    )
    match resolve(backend, "energy_score", samples, obstacle=obstacle(samples, targets)):
        case Backend.REFERENCE:
            score = energy_score_reference(*arguments)
        case Backend.TRITON:
            from calm_kernels.energy_score.function import energy_score_triton

            score = energy_score_triton(*arguments)
        case _:
            score = energy_score_eager(*arguments)
    return score.view(positions)


def gaussian_energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    exponent: float = 1.0,
    targets: Targets = "analytic",
    num_targets: int = 100,
    target_noise: Tensor | None = None,
    target_weights: Tensor | None = None,
    weight: Tensor | None = None,
    seed: Seed = None,
    first_row: int | Tensor = 0,
    return_diagnostics: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Any:
    """Unbiased energy score of a set of samples against a diagonal Gaussian, or a mixture of them;
    higher is better.

    score = mean_{i≠j} |x_i - x_j|^α  -  2 · mean_i E|x_i - y|^α,    y ~ N(mean, exp(log_std)²)

    Args:
        samples: model draws x, ``[N, ..., L]``, N >= 2, fp64 / fp32 / bf16 / fp16, any strides; a
            view of memory ``[..., N, L]`` is the fastest.
        mean: ``[..., L]``; of a mixture ``[G, ..., L]``.
        log_std: of the same shape.
        exponent: α, with 0 < α < 2.
        targets: how the expectation over y is found. ``"analytic"``: exactly, by a series where
            |x - y|² varies little and by quadrature elsewhere; no draws. ``"sample"``: as the mean
            over `num_targets` draws, shared by the samples, as published. ``"antithetic"``: the
            same with draws in pairs ±ε, for an even `num_targets`: unbiased, with less noise.
        num_targets: M, draws a position (default: the published 100).
        target_noise: draws to use, ``[M, ..., L]``; the axes between hold one row per position in
            row-major order. Given, y = mean + exp(log_std) · target_noise whatever `targets` says.
        target_weights: w of a mixture Σ_g w_g N(mean_g, exp(log_std_g)²), ``[G, ...]``, any real
            numbers, taken as they are: what they must satisfy is said at `energy_score`. Its target
            term is Σ_g w_g mean_i E|x_i - y_g|^α, exact: ``targets="analytic"`` only.
        weight: ``[...]``, multiplies each position's score; a constant. A position of weight 0
            scores 0 with gradient 0 whatever its inputs hold.
        seed: see `calm_kernels.noise.as_seed`, one seed a position included. Unused without draws.
        first_row: global row index of the first position: any split of a batch draws the same
            noise.
        return_diagnostics: return the two terms too.
        backend: see `calm_kernels.backend`.

    Returns: ``[...]`` in fp32, fp64 if an input is fp64; with `return_diagnostics` a pair of it and
        `EnergyScoreDiagnostics`. Differentiable once in samples, mean, log_std and target_weights;
        gradients are finite when points coincide (that of |v|^α at v = 0 is 0) and when a variance
        is 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, exponent, number of targets or seed;
            weights of a mixture with drawn targets, or that sum to zero as at `energy_score`.

    Source: CALM, equations 9 and 10; the exact expectation is this library's own.

    Cost: N(N-1)/2 distances a position; for each Gaussian about as much again with the series, ten
        times that with quadrature, N·M distances for draws. No ``[N, M, ..., L]`` array.
    """
    check_samples(samples)
    positions = samples.shape[1:-1]
    check_weight(weight, samples)
    check_target_weights(target_weights, samples, weight, None)
    is_mixture = target_weights is not None
    expected, meaning = tuple(samples.shape[1:]), "samples without their first axis"
    if target_weights is not None:
        expected, meaning = (len(target_weights), *expected), "a Gaussian for each of the weights"
    for name, value in (("mean", mean), ("log_std", log_std)):
        check_tensor(name, value, min_dim=1)
        check_dtype(name, value)
        check_shape(name, value, expected, meaning)
        check_device(name, value, "samples", samples)
    exponent = check_exponent(exponent)
    draws = draws_of(
        samples, targets, num_targets, target_noise, seed, first_row, is_mixture=is_mixture
    )

    flat_mean, flat_weight = components(mean, is_mixture), flat(weight, len(positions))
    arguments = (
        by_rows(samples),
        flat_mean,
        components(log_std, is_mixture),
        flat(target_weights, len(positions)),
        exponent,
    )
    found = obstacle(samples, mean, log_std)
    match resolve(backend, "gaussian_energy_score", samples, obstacle=found):
        case Backend.REFERENCE:
            drawn = None if draws is None else draws.all(*flat_mean.shape[1:])
            terms = gaussian_energy_score_reference(*arguments, drawn, flat_weight)
        case Backend.TRITON:
            from calm_kernels.energy_score.function import gaussian_energy_score_triton

            terms = gaussian_energy_score_triton(*arguments, draws, flat_weight)
        case _:
            terms = gaussian_energy_score_eager(*arguments, draws, flat_weight)
    score, fidelity, diversity, max_r2 = terms
    score = score.view(positions)
    if not return_diagnostics:
        return score
    return score, EnergyScoreDiagnostics(
        fidelity.detach().view(positions),
        diversity.detach().view(positions),
        None if max_r2 is None else max_r2.detach().view(positions),
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
    return expected_distance_eager(rows(offset), rows(std), exponent, method).view(
        offset.shape[:-1]
    )
