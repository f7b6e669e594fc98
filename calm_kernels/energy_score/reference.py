"""The energy score as the paper writes it (CALM, equations 9 and 10), differentiated by autograd.

It defines correctness for every other backend and is the "published formula" of the benchmarks:
drawn targets are broadcast against samples, ``[N, M, R, L]``, as the published code does. The one
departure is the gradient of |v|^α at v = 0: zero here, NaN for α < 1 in the published code. The
second derivative would be NaN there, so it is refused, as on the other backends.

Shapes: samples ``[N, R, L]``; targets ``[M, R, L]`` with weights ``[M, R]``; mean and log_std of G
Gaussians ``[G, R, L]`` with weights ``[G, R]``, or of one without; R positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import once_differentiable

__all__ = [
    "energy_score_reference",
    "expected_distance_reference",
    "gaussian_energy_score_reference",
]

NODES = 400


def power(distance: Tensor, exponent: float) -> Tensor:
    """distance^α with gradient 0 at distance 0, for every α in (0, 2); NaN stays NaN."""
    is_apart = distance != 0
    return torch.where(is_apart, distance, 1.0).pow(exponent) * is_apart


def distance(x: Tensor, y: Tensor, exponent: float) -> Tensor:
    """|x - y|^α; torch's norm has gradient zero at zero."""
    return power(torch.linalg.vector_norm(x - y, dim=-1), exponent)


def diversity(samples: Tensor, exponent: float) -> Tensor:
    """mean_{i≠j} |x_i - x_j|^α, ``[R]``: the unbiased estimate of E|x - x'|^α."""
    num_samples = samples.shape[0]
    distances = distance(samples[:, None], samples[None], exponent)  # [N, N, R]
    return distances.sum(dim=(0, 1)) / (num_samples * (num_samples - 1))


def fidelity(distances: Tensor, target_weights: Tensor | None) -> Tensor:
    """2 · Σ_m w_m mean_i of distances ``[N, M, R]``, w_m = 1/M without weights ``[M, R]``."""
    if target_weights is None:
        return 2 * distances.mean(dim=(0, 1))
    return 2 * (target_weights * distances.mean(dim=0)).sum(0)


def energy_score_reference(
    samples: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    exponent: float,
    weight: Tensor | None,
) -> Tensor:
    """Score ``[R]`` of samples against given targets."""
    samples, targets = without_masked(weight, samples, targets)
    target_weights, targets = without_absent(weight, target_weights, targets)
    apart = diversity(samples, exponent)
    near = fidelity(distance(samples[:, None], targets[None], exponent), target_weights)
    score = apart - near
    score = score if weight is None else weight * score
    return once_differentiable(score, "the energy score")


def gaussian_energy_score_reference(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    target_weights: Tensor | None,
    exponent: float,
    noise: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Score, fidelity, diversity and, without noise, the largest r2 of each position, ``[R]``.

    Targets are mean + exp(log_std) · noise with noise ``[M, R, L]``; without noise the expectation
    over them is exact.
    """
    samples, mean, log_std = without_masked(weight, samples, mean, log_std)
    target_weights, mean, log_std = without_absent(weight, target_weights, mean, log_std)
    std = torch.exp(log_std)
    max_r2 = None
    if noise is None:
        max_r2 = relative_variance(samples, mean, std, target_weights)
        offset = samples[:, None] - mean  # [N, G, R, L]
        expected = expected_distance_reference(offset, std.expand_as(offset), exponent)
        near = fidelity(expected, target_weights).to(samples.dtype)
    else:
        (noise,) = without_masked(weight, noise)
        points = mean + std * noise.to(std.dtype)
        near = fidelity(distance(samples[:, None], points[None], exponent), None)
    apart = diversity(samples, exponent)
    if weight is not None:
        near, apart = weight * near, weight * apart
        max_r2 = None if max_r2 is None else max_r2.masked_fill(weight == 0, 0)
    return once_differentiable(apart - near, "the energy score"), near, apart, max_r2


def without_masked(weight: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs in the dtype of the score, with zeros where the weight ``[R]`` is 0."""
    dtype = torch.float64 if torch.float64 in {value.dtype for value in inputs} else torch.float32
    inputs = tuple(value.to(dtype) for value in inputs)
    if weight is None:
        return inputs
    return tuple(value.masked_fill((weight == 0)[:, None], 0) for value in inputs)


def without_absent(
    weight: Tensor | None, target_weights: Tensor | None, *inputs: Tensor
) -> tuple[Any, ...]:
    """Target weights ``[M, R]`` and inputs ``[M, R, L]``, with zeros where a target's weight is 0.

    If the weights need a gradient, inputs stay as they are: it is the distance to them.
    """
    if target_weights is None:
        return None, *inputs
    target_weights = target_weights.to(inputs[0].dtype)
    if weight is not None:
        target_weights = target_weights.masked_fill(weight == 0, 0)
    if target_weights.requires_grad:
        return target_weights, *inputs
    absent = (target_weights == 0)[..., None]
    return target_weights, *(value.masked_fill(absent, 0) for value in inputs)


def relative_variance(
    samples: Tensor, mean: Tensor, std: Tensor, target_weights: Tensor | None
) -> Tensor:
    """Largest r2 = Var|v|² / (E|v|²)² of a position's v_n ~ N(x_n - mean, std²), ``[R]``.

    It is 0 where v = 0; Gaussians of weight 0 do not count.
    """
    variance, offset2 = std.square(), (samples[:, None] - mean).square()  # [N, G, R, L]
    mean_square = (variance + offset2).sum(-1, keepdim=True)
    mean_square = torch.where(mean_square == 0, 1.0, mean_square)
    variance, offset2 = variance / mean_square, offset2 / mean_square  # squares stay in range
    r2 = (2 * variance * (variance + 2 * offset2)).sum(-1)
    if target_weights is not None:
        r2 = r2.masked_fill(target_weights == 0, 0)
    return r2.amax((0, 1))


def expected_distance_reference(offset: Tensor, std: Tensor, exponent: float) -> Tensor:
    """E|v|^α for v ~ N(offset, std²) over the last axis, in float64 whatever the input.

    With p = α/2, the Laplace transform φ(t) = E exp(-t|v|²) and B(t) = -d ln φ / dt,

        E|v|^α = 1/Γ(1-p) ∫_0^∞ t^-p φ(t) B(t) dt,
        φ = Π (1 + 2ts²)^(-1/2) exp(-tm² / (1 + 2ts²)),   B = Σ s² / (1 + 2ts²) + m² / (1 + 2ts²)²

    by the trapezoid rule in u with ln(tS) = sinh(u), S = E|v|²: double exponential at both ends.
    """
    order = exponent / 2
    variance, offset2 = std.double().square(), offset.double().square()
    scale = (variance + offset2).sum(-1, keepdim=True).detach()  # only places the nodes
    scale = torch.where(scale > 0, scale, 1.0)
    variance, offset2 = variance / scale, offset2 / scale

    first, last = -math.asinh(38 / (1 - order)), math.asinh(80)
    u = torch.linspace(first, last, NODES, dtype=torch.float64, device=offset.device)
    log_time = torch.sinh(u)
    weight = torch.exp((1 - order) * log_time) * torch.cosh(u) * (last - first) / (NODES - 1)

    time = torch.exp(log_time)[:, None]  # [Q, 1]
    shrink = 1 / (1 + 2 * time * variance[..., None, :])  # [..., Q, L]
    log_transform = (0.5 * torch.log(shrink) - time * offset2[..., None, :] * shrink).sum(-1)
    rate = (variance[..., None, :] * shrink + offset2[..., None, :] * shrink.square()).sum(-1)
    integral = (weight * torch.exp(log_transform) * rate).sum(-1)
    return scale[..., 0].pow(order) * integral / math.gamma(1 - order)
