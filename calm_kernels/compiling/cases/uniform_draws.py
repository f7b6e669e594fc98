"""Draws: a number for a token, times, the normals of 65,536 latents; a row is a block of calls."""

from collections.abc import Iterator

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.uniform_draws.kernels import draw_constants, normal_kernel, uniform_kernel

__all__ = ["cases"]

CALLS = 256  # of Philox, a row


def _case(
    name: str, rows: int, *, is_normal: bool = False, dtype: torch.dtype = torch.float32,
    first_row: str = "i32", budget: int | None = None, is_main: bool = False,
) -> Configuration:  # fmt: skip
    return Configuration(
        name=f"{'normal' if is_normal else 'uniform'}_draws.{name}",
        kernel=normal_kernel if is_normal else uniform_kernel,
        dtype=dtype,
        constants=lambda target: draw_constants(
            target.name, is_normal=is_normal, has_fast_math=target.is_nvidia
        ),
        trips=lambda _: (),
        bytes_per_row=CALLS * (8 if is_normal else 4) * dtype.itemsize,
        rows=rows,
        programs=lambda found: rows * CALLS / found["BLOCK"],
        budget=budget,
        types={"seed_ptr": "*i64", "row": first_row},
        is_main=is_main,
    )


def cases() -> Iterator[Configuration]:
    """Both kernels, the dtypes that are drawn, a first row in memory and one beyond 32 bits."""
    yield _case("token", 1, dtype=torch.float64, budget=2000, is_main=True)
    yield _case("times", 8, first_row="*i64")
    yield _case("latents", 4096, is_normal=True, budget=2500, is_main=True)
    yield _case("bf16", 4096, is_normal=True, dtype=torch.bfloat16, first_row="i64")
