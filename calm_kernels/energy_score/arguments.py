"""What the public functions take: checks of the arguments, and their shapes inside this folder.

Positions are rows: samples ``[N, R, L]``, given targets ``[M, R, L]`` with weights ``[M, R]``, mean
and log_std of G Gaussians ``[G, R, L]`` with weights ``[G, R]``; one Gaussian is G = 1 without.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from calm_kernels.backend import is_host_readable
from calm_kernels.checks import (
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_tensor,
)
from calm_kernels.energy_score.targets import TargetDraws
from calm_kernels.noise import Seed, as_seed
from calm_kernels.operators import is_traced

__all__ = [
    "Targets",
    "by_rows",
    "check_samples",
    "check_target_weights",
    "check_weight",
    "components",
    "draws_of",
    "flat",
    "obstacle",
    "rows",
]

Targets = Literal["analytic", "antithetic", "sample"]
TARGETS = get_args(Targets)
# A position of this latent size fits into the registers of a program.
TRITON_MAX_LATENT = 1024


def obstacle(*inputs: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, None if they can."""
    if any(value.dtype == torch.float64 for value in inputs):
        return "computes in float32 and takes no float64 input"
    if inputs[0].shape[-1] > TRITON_MAX_LATENT:
        return f"takes latent sizes up to {TRITON_MAX_LATENT}, got {inputs[0].shape[-1]}"
    return None


def by_rows(points: Tensor) -> Tensor:
    """``[N, ..., L]`` as ``[N, R, L]``, a view where strides allow."""
    return points[:, None] if points.dim() == 2 else points.flatten(1, -2)


def rows(parameter: Tensor) -> Tensor:
    """``[..., L]`` as ``[R, L]``."""
    return parameter[None] if parameter.dim() == 1 else parameter.flatten(0, -2)


def components(parameter: Tensor, is_mixture: bool) -> Tensor:
    """Mean or log_std, ``[..., L]`` or of a mixture ``[G, ..., L]``, as ``[G, R, L]``."""
    return by_rows(parameter) if is_mixture else rows(parameter)[None]


def flat(weight: Tensor | None, num_axes: int) -> Tensor | None:
    """A weight with its last `num_axes` axes, the positions, as one; None stays None."""
    if weight is None:
        return None
    return weight[..., None] if num_axes == 0 else weight.flatten(-num_axes)


def check_samples(samples: Tensor) -> None:
    """Two draws or more, of one feature or more."""
    check_tensor("samples", samples, min_dim=2)
    check_dtype("samples", samples)
    if samples.shape[0] < 2:
        raise ValueError(
            "samples must hold at least 2 draws along the first axis (the score compares pairs), "
            f"got shape {tuple(samples.shape)}"
        )
    if samples.shape[-1] < 1:
        raise ValueError(f"samples must have latent size >= 1, got shape {tuple(samples.shape)}")


def check_weight(weight: Tensor | None, samples: Tensor) -> None:
    """One number a position, a constant."""
    if weight is None:
        return
    check_tensor("weight", weight)
    check_dtype("weight", weight)
    check_shape("weight", weight, samples.shape[1:-1], "the positions of samples")
    check_device("weight", weight, "samples", samples)
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: it is a constant of the score")


def check_target_weights(
    target_weights: Tensor | None, samples: Tensor, weight: Tensor | None, num_targets: int | None
) -> None:
    """A number for each of `num_targets` targets (None: any number) of each position.

    Their sums are checked where reading them waits for no device; see `energy_score`.
    """
    if target_weights is None:
        return
    check_tensor("target_weights", target_weights, min_dim=1)
    check_dtype("target_weights", target_weights)
    count = target_weights.shape[0] if num_targets is None else num_targets
    meaning = "one for each target and position"
    check_shape("target_weights", target_weights, (count, *samples.shape[1:-1]), meaning)
    check_device("target_weights", target_weights, "samples", samples)
    if count < 1:
        raise ValueError("target_weights must hold at least 1 target, got 0")
    if is_traced() or not is_host_readable(target_weights):
        return
    exact = target_weights.detach().double()
    rounding = torch.finfo(target_weights.dtype).eps * exact.abs().sum(0)
    is_zero = exact.sum(0).abs() <= rounding
    if weight is not None:
        is_zero &= weight != 0
    if is_zero.any():
        raise ValueError(
            f"target_weights must not sum to zero over the first axis, as at {int(is_zero.sum())} "
            f"of {is_zero.numel()} positions: nothing would keep the samples there from running "
            "off; give a position without targets weight 0"
        )


def draws_of(
    samples: Tensor,
    targets: str,
    num_targets: int,
    noise: Tensor | None,
    seed: Seed,
    first_row: int | Tensor,
    *,
    is_mixture: bool,
) -> TargetDraws | None:
    """Where the targets come from; None for the exact expectation, which alone takes mixtures."""
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {', '.join(TARGETS)}; got {targets!r}")
    check_integer("num_targets", num_targets, 1)
    if is_mixture and (noise is not None or targets != "analytic"):
        given = "target_noise" if noise is not None else f"targets={targets!r}"
        raise ValueError(f'target_weights must come with targets="analytic", got {given}')
    if noise is not None:
        return TargetDraws(_noise_by_rows(noise, samples), noise.shape[0])
    if targets == "analytic":
        return None
    is_antithetic = targets == "antithetic"
    if is_antithetic and num_targets % 2:
        raise ValueError(f'num_targets must be even for targets="antithetic", got {num_targets}')
    found = as_seed(seed, samples.device)
    num_rows = samples[0, ..., 0].numel()
    if found.dim() == 2 and found.shape[0] != num_rows:
        raise ValueError(f"seed must have one row per position, {num_rows}; got {found.shape[0]}")
    return TargetDraws(None, num_targets, found, first_row, is_antithetic)


def _noise_by_rows(noise: Tensor, samples: Tensor) -> Tensor:
    """Given draws ``[M, ..., L]`` as ``[M, R, L]``; only the number of rows counts."""
    check_tensor("target_noise", noise, min_dim=2)
    check_dtype("target_noise", noise)
    check_device("target_noise", noise, "samples", samples)
    num_rows, width = samples[0, ..., 0].numel(), samples.shape[-1]
    given = by_rows(noise)
    if noise.shape[0] < 1 or tuple(given.shape[1:]) != (num_rows, width):
        raise ValueError(
            f"target_noise must have shape [M, ..., {width}] with M >= 1 and {num_rows} rows "
            f"between, got {tuple(noise.shape)}"
        )
    return given
