"""The torch backend: Philox on 64-bit integers of torch."""

from typing import Any

import torch
from torch import Tensor

from calm_kernels import noise
from calm_kernels.noise import Stream

__all__ = ["draws_eager"]


def draws_eager(
    seed: Tensor, num_rows: int, width: int, is_normal: bool, stream: Stream, dtype: torch.dtype,
    **options: Any,
) -> Tensor:  # fmt: skip
    """``[N, R, W]``; see `calm_kernels.uniform_draws`."""
    draw = noise.normal if is_normal else noise.uniform
    return draw(
        num_rows, width, stream=stream, seed=seed, device=seed.device, dtype=dtype, **options
    )
