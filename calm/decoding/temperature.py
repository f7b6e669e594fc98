"""Temperature for a model that can only be sampled: 1/T draws that agree.

A law sharpened to P(x)^(1/T) cannot be computed without probabilities, but 1/T independent draws of
the model that happen to be equal follow it. Algorithm 2 of the paper looks for such agreement among
N candidates (`calm_kernels.agreeing_patch`).
"""

import math

import torch
from torch import Tensor

from calm.decoding.rounds import Power
from calm.errors import UserError
from calm_kernels.agreeing_patch import agreeing_patch

__all__ = ["METHODS", "candidates_needed", "check_sampling", "split_power", "vote"]

TOLERANCE = 1e-6  # as in `calm_kernels.agreeing_patch`
METHODS = ("batch",)  # Algorithm 2


def split_power(temperature: float) -> Power:
    """1/T = n + a with n >= 1 and 0 <= a < 1; a is 0 within rounding, 1e-6 relative.

    Args:
        temperature: T in (0, 1].
    """
    power = 1.0 / temperature
    nearest = round(power)
    if abs(power - nearest) <= TOLERANCE * power:
        return Power(nearest, 0.0)
    return Power(math.floor(power), power - math.floor(power))


def check_sampling(temperature: float, num_samples: int, noise_scale: float, method: str) -> None:
    """Raise `UserError` unless 0 < T <= 1, N >= 1, the scale >= 0 and the method in `METHODS`."""
    if not 0.0 < temperature <= 1.0:
        raise UserError(f"temperature must lie in (0, 1], got {temperature}")
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    if not (noise_scale >= 0.0 and math.isfinite(noise_scale)):
        raise UserError(f"noise_scale must be finite and at least 0, got {noise_scale}")
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")


def candidates_needed(temperature: float, num_samples: int) -> int:
    """Draws a chunk: one at temperature 1, else N."""
    return 1 if temperature == 1.0 else num_samples


def vote(
    candidates: Tensor, temperature: float, *, seed: Tensor, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """One of the candidates of each row, as if 1/T independent draws had agreed on it.

    Args:
        candidates: token ids ``[B, N, K]``.
        temperature: T in (0, 1]; 1 takes the first candidate.
        seed: int64 ``[2]``, or ``[B, 2]``.
        first_row: global index of the first row.

    Returns: tokens ``[B, K]`` and how many draws agreed, ``[B]`` (less than 1/T where no patch
        occurred that often).
    Source: paper, Algorithm 2, and for 1/T that is not whole `calm_kernels.agreeing_patch`.
    """
    if temperature == 1.0:
        return candidates[:, 0], torch.ones_like(candidates[:, 0, 0])
    tokens, level, *_ = agreeing_patch(
        candidates, 1.0 / temperature, seed=seed, first_row=first_row
    )
    return tokens, level
