"""The energy head's kernels at 8192 positions, N = 8 draws, noise of 64."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.targets import Target
from calm_kernels.energy_head.activation_kernels import (
    activation_constants,
    silu_backward_kernel,
    silu_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)
from calm_kernels.energy_head.embedding_kernels import (
    embed_backward_kernel,
    embed_kernel,
    embedding_constants,
)
from calm_kernels.energy_head.norm_kernels import norm_backward_kernel, norm_constants, norm_kernel
from calm_kernels.tuning import Constants, setting

__all__ = ["cases"]

POSITIONS, NUM_DRAWS, NOISE_SIZE = 8192, 8, 64
ROWS = POSITIONS * NUM_DRAWS
WIDTHS = (768, 1024, 1536, 2560)
GROUPS = setting("energy_head.groups", "default", 1).block_rows
# Under autocast parameters that are vectors stay float32, as does the residual stream.
_FLOAT32 = (
    "stream_ptr", "next_ptr", "sums_ptr", "norm_weight_ptr", "norm_shift_ptr",
    "next_weight_ptr", "next_shift_ptr", "bias_ptr", "shift_ptr",
)  # fmt: skip
_TYPES = dict.fromkeys(_FLOAT32, "*fp32") | {"seed_ptr": "*i64", "noise_scale": "fp32"}
_ALIGNED = ("stride_group", "stride_n", "stride_r")


def _name(form: str, width: int, dtype: torch.dtype) -> str:
    suffix = ".fp32" if dtype == torch.float32 else ""
    return f"energy_head.{form}.C{width}{suffix}"


def _is_main(width: int, dtype: torch.dtype) -> bool:
    """Compiled by the tests, too."""
    return width == 1024 and dtype == torch.bfloat16


def _trips(constants: dict[str, Any], rows: int, *inner: int) -> tuple[int, ...]:
    """Of the loop of a group over its tiles; as on most machines, with 264 groups."""
    tiles = math.ceil(rows / constants["BLOCK_ROWS"])
    return math.ceil(tiles / GROUPS), *inner


def _norm(form: str, kernel: Any, width: int, dtype: torch.dtype, **flags: bool) -> Configuration:
    """Step in, stream in and out, normed out; backward stream and two gradients in, one and normed
    out.
    """
    is_backward = kernel is norm_backward_kernel
    size = dtype.itemsize
    traffic = (8 + 2 * size) if not is_backward else (4 + 4 * size)

    def constants(target: Target) -> Constants:
        found, options = norm_constants(width, target.name, is_backward=is_backward)
        return found | flags, options

    return Configuration(
        name=_name(form, width, dtype),
        kernel=kernel,
        dtype=dtype,
        constants=constants,
        trips=lambda found: _trips(found, ROWS) if is_backward else (),
        bytes_per_row=traffic * width,
        rows=ROWS,
        programs=lambda found: GROUPS if is_backward else math.ceil(ROWS / found["BLOCK_ROWS"]),
        types=_TYPES | {"weight_ptr": "*fp32"},
        aligned=_ALIGNED,
        is_main=_is_main(width, dtype),
    )


def _activation(
    form: str, kernel: Any, width: int, dtype: torch.dtype, elements: float, **flags: bool
) -> Configuration:
    """`elements` a feature in and out."""
    is_backward = kernel in (silu_backward_kernel, swiglu_backward_kernel)
    has_context = flags.get("HAS_CONTEXT", False)

    def constants(target: Target) -> Constants:
        found, options = activation_constants(width, target.name, has_fast_math=target.is_nvidia)
        return found | flags, options

    def trips(found: dict[str, Any]) -> tuple[int, ...]:
        if not is_backward:
            return ()
        return _trips(found, POSITIONS, NUM_DRAWS) if has_context else _trips(found, ROWS)

    def programs(found: dict[str, Any]) -> float:
        columns = math.ceil(width / found["BLOCK_COLUMNS"])
        return columns * (GROUPS if is_backward else math.ceil(ROWS / found["BLOCK_ROWS"]))

    return Configuration(
        name=_name(form, width, dtype),
        kernel=kernel,
        dtype=dtype,
        constants=constants,
        trips=trips,
        bytes_per_row=elements * dtype.itemsize * width,
        rows=ROWS,
        programs=programs,
        types=_TYPES,
        aligned=(*_ALIGNED, "stride_context"),
        is_main=_is_main(width, dtype),
    )


def _embedding(form: str, kernel: Any, width: int, dtype: torch.dtype) -> Configuration:
    """Stream and its norm out; backward the stream's gradient in, the matmul's out."""
    is_backward = kernel is embed_backward_kernel

    def constants(target: Target) -> Constants:
        return embedding_constants(
            width,
            NOISE_SIZE,
            dtype,
            target.name,
            is_given=False,
            is_backward=is_backward,
            has_fast_math=target.is_nvidia,
        )

    def trips(found: dict[str, Any]) -> tuple[int, ...]:
        passes = (math.ceil(width / found["SEGMENT"]),) * 3
        return _trips(found, ROWS, *passes) if is_backward else passes

    return Configuration(
        name=_name(form, width, dtype),
        kernel=kernel,
        dtype=dtype,
        constants=constants,
        trips=trips,
        bytes_per_row=((dtype.itemsize if is_backward else 4) + dtype.itemsize) * width,
        rows=ROWS,
        programs=lambda found: GROUPS if is_backward else math.ceil(ROWS / found["BLOCK_ROWS"]),
        flops_per_row=2 * NOISE_SIZE * width,
        types=_TYPES,
        aligned=_ALIGNED,
        is_main=_is_main(width, dtype),
    )


def _at(width: int, dtype: torch.dtype) -> Iterator[Configuration]:
    shared = 1 / NUM_DRAWS  # of what a position has once
    yield _norm("norm", norm_kernel, width, dtype, HAS_STEP=True, HAS_STREAM=True)
    yield _norm(
        "norm.backward", norm_backward_kernel, width, dtype, HAS_STREAM=True, HAS_UPSTREAM=True,
    )  # fmt: skip
    yield _activation("context_silu", silu_kernel, width, dtype, 2 + shared, HAS_CONTEXT=True)
    yield _activation("silu", silu_kernel, width, dtype, 2, HAS_CONTEXT=False)
    yield _activation("swiglu", swiglu_kernel, width, dtype, 3)
    yield _activation(
        "context_silu.backward", silu_backward_kernel, width, dtype, 4 + 2 * shared,
        HAS_CONTEXT=True,
    )  # fmt: skip
    yield _activation("silu.backward", silu_backward_kernel, width, dtype, 4, HAS_CONTEXT=False)
    yield _activation("swiglu.backward", swiglu_backward_kernel, width, dtype, 6)
    yield _embedding("embed", embed_kernel, width, dtype)
    yield _embedding("embed.backward", embed_backward_kernel, width, dtype)


def cases() -> Iterator[Configuration]:
    """Every kernel at every width; float32 at the default one."""
    for width in WIDTHS:
        yield from _at(width, torch.bfloat16)
    yield from _at(1024, torch.float32)
