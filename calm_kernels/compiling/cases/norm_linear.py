"""Layers for few rows at the sizes of CALM-M and Transformer-S: one row, 64 rows, float32."""

import math
from collections.abc import Iterator

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.inspection import Fixed
from calm_kernels.norm_linear.kernels import (
    Form,
    layer_constants,
    linear_residual_kernel,
    norm_linear_kernel,
    norm_swiglu_kernel,
)

__all__ = ["cases"]

_KERNELS = {
    "norm_linear": norm_linear_kernel,
    "norm_swiglu": norm_swiglu_kernel,
    "linear_residual": linear_residual_kernel,
}
_WARP = {"sm_90": "HMMA"}


def _layer(
    form: Form, rows: int, width: int, dtype: torch.dtype, *, is_main: bool = False, **outputs: int
) -> Configuration:
    """Weights once, rows in and out."""
    total = sum(outputs.values())
    num_weights = 2 if form == "norm_swiglu" else 1
    moved = width + total * (2 if form == "linear_residual" else 1)
    suffix = ".fp32" * (dtype == torch.float32)
    return Configuration(
        name=f"{form}{suffix}.R{rows}.H{width}",
        kernel=_KERNELS[form],
        dtype=dtype,
        constants=lambda target: layer_constants(
            form,
            rows,
            width,
            dtype,
            target.name,
            has_fast_math=target.is_nvidia,
            can_round=True,
            **outputs,
        ),
        trips=lambda found: (Fixed(math.ceil(width / found["BLOCK_K"])),),
        bytes_per_row=dtype.itemsize * (moved + num_weights * total * width / rows),
        rows=rows,
        programs=lambda found: (
            math.ceil(rows / found["BLOCK_R"])
            * sum(math.ceil(count / found["BLOCK_C"]) for count in outputs.values())
        ),
        flops_per_row=2.0 * num_weights * total * width,
        types={"norm_eps": "fp32"},
        needed=_WARP if dtype == torch.bfloat16 else {},
        is_main=is_main,
    )


def _at(
    rows: int, width: int, inner: int, dtype: torch.dtype = torch.bfloat16, *, is_main: bool = False
) -> Iterator[Configuration]:
    """The layers of a decoder layer; `inner` is the width of its MLP."""
    yield _layer(
        "norm_linear", rows, width, dtype, is_main=is_main, FIRST=width, SECOND=width, THIRD=width
    )
    yield _layer("norm_swiglu", rows, width, dtype, is_main=is_main, OUTPUTS=inner)
    yield _layer("linear_residual", rows, width, dtype, OUTPUTS=width)
    yield _layer("linear_residual", rows, inner, dtype, is_main=is_main, OUTPUTS=width)


def cases() -> Iterator[Configuration]:
    """Every row of the table; 1000 features fill no block."""
    yield from _at(1, 1024, 2752, is_main=True)
    yield from _at(64, 1024, 2752)
    yield from _at(1, 768, 2048)
    yield from _at(64, 1000, 1500)
    yield from _at(1, 1024, 2752, torch.float32)
