"""The public functions: check the arguments, choose the backend, call it."""

import torch
from torch import Tensor

from calm_kernels.backend import Backend, resolve
from calm_kernels.checks import FLOATS
from calm_kernels.noise import Seed, Stream, as_seed, check_draws
from calm_kernels.uniform_draws.eager import draws_eager
from calm_kernels.uniform_draws.reference import draws_reference

__all__ = ["normal_draws", "uniform_draws"]

MAX_ELEMENTS = 2**30  # whose places a kernel counts in 32 bits


def uniform_draws(
    num_rows: int,
    width: int,
    *,
    stream: Stream,
    seed: Seed = None,
    num_draws: int | None = None,
    first_row: int | Tensor = 0,
    first_draw: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Uniform draws in [0, 1), multiples of 2^-24 before they are rounded to `dtype`.

    draw = (word >> 8) / 2^24,    word of Philox 4x32-10 at (seed, stream; draw, row, offset)

    Args:
        num_rows: R, rows of this call. Row ``r`` is row ``first_row + r`` of the stream; with a
            seed per row every row is row `first_row` of its own stream.
        width: W >= 1, elements a row.
        stream: what the draws are for.
        seed: see `calm_kernels.noise.as_seed`; its values are not read on the host.
        num_draws: N draws a row; None for one, without the leading axis.
        first_row: index of the first row, an integer or an int64 scalar on the device.
        first_draw: index of the first draw, to continue a sequence of draws.
        device: where the draws are made.
        dtype: of the result, a floating one.
        backend: see `calm_kernels.backend`; all give the same bits.

    Returns: ``[num_draws, num_rows, width]`` (a view of row-major memory) or ``[num_rows, width]``.
        Nothing is differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.

    Cost: in Triton one launch that writes the result; in torch some 170 operations.
    """
    return _draws(
        False, num_rows, width, stream, seed, num_draws, first_row, first_draw, device, dtype,
        backend,
    )  # fmt: skip


def normal_draws(
    num_rows: int,
    width: int,
    *,
    stream: Stream,
    seed: Seed = None,
    num_draws: int | None = None,
    first_row: int | Tensor = 0,
    first_draw: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Standard normal draws by Box-Muller, |draw| < 5.4; arguments and result as `uniform_draws`.

    radius = √(-2 ln((k + 1/2) / 2^20)),    angle = (j + 1/2) 2π / 2^12 - π

    with k the upper 20 and j the lower 12 bits of a word, which gives radius · cos(angle) and
    radius · sin(angle). Backends agree to 2e-6, with NVIDIA's special functions to 1e-3.
    """
    return _draws(
        True, num_rows, width, stream, seed, num_draws, first_row, first_draw, device, dtype,
        backend,
    )  # fmt: skip


def _draws(
    is_normal: bool, num_rows: int, width: int, stream: Stream, seed: Seed, num_draws: int | None,
    first_row: int | Tensor, first_draw: int, device: torch.device | str, dtype: torch.dtype,
    backend: Backend | str,
) -> Tensor:  # fmt: skip
    seed = as_seed(seed, device)
    check_draws(seed, num_rows, width, num_draws, first_row, first_draw)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a floating one, got {dtype}")
    count = 1 if num_draws is None else num_draws
    name = "normal_draws" if is_normal else "uniform_draws"
    is_large = num_rows * count * width > MAX_ELEMENTS
    obstacle = f"draws at most {MAX_ELEMENTS} numbers at a time" if is_large else None
    match resolve(backend, name, seed, obstacle=obstacle):
        case Backend.REFERENCE:
            drawn = draws_reference(
                seed, num_rows, width, count, first_row, first_draw, int(stream), is_normal
            ).to(dtype)
        case Backend.TRITON:
            from calm_kernels.uniform_draws.function import draws_triton

            drawn = draws_triton(
                seed, num_rows, width, count, first_row, first_draw, int(stream), is_normal, dtype
            )
        case _:
            drawn = draws_eager(
                seed, num_rows, width, is_normal, stream, dtype, num_draws=count,
                first_row=first_row, first_draw=first_draw,
            )  # fmt: skip
    return drawn[0] if num_draws is None else drawn
