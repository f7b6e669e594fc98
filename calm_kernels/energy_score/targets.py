"""Draws of the target distribution: given by the caller, or drawn from a seed."""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_kernels.noise import Stream, normal

__all__ = ["TargetDraws"]


class TargetDraws(NamedTuple):
    """How targets are drawn: given noise ``[M, R, L]``, or M draws of a seed."""

    noise: Tensor | None
    num_targets: int
    seed: Tensor | None = None
    first_row: int | Tensor = 0
    is_antithetic: bool = False

    @property
    def num_drawn(self) -> int:
        """Draws of noise: half of the targets if these come in pairs ±ε."""
        return self.num_targets // 2 if self.is_antithetic else self.num_targets

    @property
    def stride_seed(self) -> int:
        """Elements from one position's seed to the next; 0 if they share it."""
        return 0 if self.seed is None or self.seed.dim() == 1 else 2

    def all(self, num_rows: int, width: int) -> Tensor:
        """Draws of every position, ``[M, R, L]``."""
        if self.noise is not None:
            return self.noise
        return self.of(slice(0, num_rows), width, torch.float32, None).transpose(0, 1)

    def of(self, rows: slice, width: int, dtype: torch.dtype, is_masked: Tensor | None) -> Tensor:
        """Standard normal draws of these rows, ``[r, M, L]``; given ones are 0 where masked."""
        if self.noise is not None:
            given = self.noise[:, rows].transpose(0, 1).to(dtype)
            return given if is_masked is None else given.masked_fill(is_masked[:, None, None], 0)
        assert self.seed is not None  # api.py gives one of noise and seed
        has_row_seeds = self.seed.dim() == 2
        drawn = normal(
            rows.stop - rows.start,
            width,
            stream=Stream.TARGETS,
            seed=self.seed[rows] if has_row_seeds else self.seed,
            num_draws=self.num_drawn,
            first_row=self.first_row if has_row_seeds else self.first_row + rows.start,
            device=self.seed.device,
            dtype=dtype,
        ).transpose(0, 1)
        return torch.cat([drawn, -drawn], dim=1) if self.is_antithetic else drawn
