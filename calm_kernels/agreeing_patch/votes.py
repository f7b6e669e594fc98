"""What a vote needs of each row: the power s = 1/T in two parts, and one uniform draw."""

import torch
from torch import Tensor

from calm_kernels import noise
from calm_kernels.noise import Stream

__all__ = ["TOLERANCE", "draw_votes", "split_power"]

TOLERANCE = 1e-6  # relative; 1/T computed in float32 is off by 1e-7


def split_power(power: Tensor) -> tuple[Tensor, Tensor]:
    """Whole part n and rest a of s = n + a, each ``[B]``; a is 0 within `TOLERANCE`."""
    nearest = power.round()
    is_whole = (power - nearest).abs() <= TOLERANCE * power
    whole = torch.where(is_whole, nearest, power.floor())
    return whole, torch.where(is_whole, 0.0, power - whole)


def draw_votes(power: Tensor, seed: Tensor, first_row: int | Tensor) -> Tensor:
    """One number of U[0, 1) for each s of `power`, float64 ``[B]``, of the stream `VOTE`."""
    return noise.uniform(
        len(power), 1, stream=Stream.VOTE, seed=seed, first_row=first_row, device=power.device,
        dtype=torch.float64,
    )[:, 0]  # fmt: skip
