"""The reparameterization of 8192 chunks, L = 128."""

from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.reparameterize.kernels import backward_kernel, constants, forward_kernel

__all__ = ["cases"]

ROWS, WIDTH = 8192, 128
_TYPES = {
    "keep_ptr": "*i1",
    "seed_ptr": "*i64",
    "first_row_ptr": "*i64",
    "kl_ptr": "*fp32",
    "dkl_ptr": "*fp32",
    "kl_floor": "fp32",
    "dropout": "fp32",
}
_ONES = ("stride_l", "stride_noise_l", "stride_keep_l", "stride_dlatent_l", "stride_dkl")
_ALIGNED = ("num_rows", "stride_r", "stride_noise_r", "stride_keep_r", "stride_dlatent_r")


def _case(
    name: str, kernel: Any, traffic: int, *, is_given: bool = False, budget: int | None = None,
    is_main: bool = False, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH,
) -> Configuration:  # fmt: skip
    """Traffic in elements a latent."""
    return Configuration(
        name=f"reparameterize.{name}",
        kernel=kernel,
        dtype=dtype,
        constants=lambda target: constants(
            width,
            target.name,
            is_given=is_given,
            keep=1 if is_given else 2,
            has_fast_math=target.is_nvidia,
        ),
        trips=lambda _: (),
        bytes_per_row=dtype.itemsize * traffic * width,
        rows=ROWS,
        programs=lambda constants: ROWS / constants["BLOCK_ROWS"],
        budget=budget,
        types=_TYPES,
        ones=_ONES,
        aligned=_ALIGNED,
        is_main=is_main,
    )


def cases() -> Iterator[Configuration]:
    """Both directions, draws from a seed or given."""
    yield _case("forward", forward_kernel, 3, budget=400, is_main=True)
    yield _case("backward", backward_kernel, 5, budget=400, is_main=True)
    yield _case("forward.given", forward_kernel, 4, is_given=True)
    yield _case("backward.given", backward_kernel, 6, is_given=True)
    yield _case("backward.fp32", backward_kernel, 5, dtype=torch.float32)
    yield _case("backward.L1024", backward_kernel, 5, width=1024)
