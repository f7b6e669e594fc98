"""The draws as one custom op for torch.compile; nothing here is differentiable."""

import torch
from torch import Tensor

from calm_kernels.noise import split_first_row
from calm_kernels.operators import operator
from calm_kernels.uniform_draws.kernels import write_draws

__all__ = ["draws_triton"]


def draws_triton(
    seed: Tensor, num_rows: int, width: int, num_draws: int, first_row: int | Tensor,
    first_draw: int, stream: int, is_normal: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``[N, R, W]``, a view of ``[R, N, W]``, in one launch; see `calm_kernels.uniform_draws`."""
    row, number = split_first_row(first_row, seed.device)
    drawn = _draws_op(
        seed.contiguous(),
        row,
        number,
        num_rows,
        width,
        num_draws,
        first_draw,
        stream,
        is_normal,
        dtype,
    )
    return drawn.transpose(0, 1)


@operator("draws")
def _draws_op(
    seed: Tensor,
    row: Tensor | None,
    row_number: int,
    num_rows: int,
    width: int,
    num_draws: int,
    first_draw: int,
    stream: int,
    is_normal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``[R, N, W]``; the first row is that in memory, or the number."""
    out = seed.new_empty(num_rows, num_draws, width, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(seed):
            first_row = row_number if row is None else row
            write_draws(seed, first_row, out, first_draw, stream, is_normal=is_normal)
    return out


@_draws_op.register_fake
def _(
    seed: Tensor, row: Tensor | None, row_number: int, num_rows: int, width: int, num_draws: int,
    first_draw: int, stream: int, is_normal: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return seed.new_empty(num_rows, num_draws, width, dtype=dtype)
