"""The energy head's fused layers at decoding: one draw, 200 and 800 of one position."""

import math
from collections.abc import Iterator

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.inspection import Fixed
from calm_kernels.energy_head.embedding_kernels import noise_constants
from calm_kernels.energy_head.norm_kernels import embedding_norm_constants, embedding_norms_kernel
from calm_kernels.energy_head.small_rows_kernels import (
    Form,
    embed_layer_kernel,
    layer_constants,
    residual_layer_kernel,
    silu_layer_kernel,
    swiglu_layer_kernel,
)

__all__ = ["cases"]

NOISE_SIZE = 64
_KERNELS = {
    "silu": silu_layer_kernel,
    "swiglu": swiglu_layer_kernel,
    "residual": residual_layer_kernel,
}
_WARP, _GROUP = {"sm_90": "HMMA"}, {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
_TYPES = {
    **dict.fromkeys(("stream_ptr", "parts_ptr", "embedded_ptr"), "*fp32"),
    "seed_ptr": "*i64",
    "noise_scale": "fp32",
}


def _layer(
    form: Form, rows: int, width: int, dtype: torch.dtype, needed: dict[str, str], **flags: bool
) -> Configuration:
    """Weights once, rows in and out; the residual layer reads and writes the stream."""
    has_norm = flags.get("HAS_NORM", False)
    is_joined = flags.get("IS_JOINED", False)
    num_outputs = 2 * width if form == "swiglu" or is_joined else width  # or twice as many inputs
    in_and_out = {"silu": 2, "swiglu": 2, "residual": 1}[form] * dtype.itemsize
    stream = 8 * (form == "residual") + (4 - dtype.itemsize) * has_norm
    suffix = (
        ".joined" * (is_joined and not has_norm)
        + ".norm" * has_norm
        + ".fp32" * (dtype == torch.float32)
    )
    return Configuration(
        name=f"energy_head.layer.{form}{suffix}.R{rows}.C{width}",
        kernel=_KERNELS[form],
        dtype=dtype,
        constants=lambda target: layer_constants(
            form, rows, width, dtype, target.name, has_fast_math=target.is_nvidia, **flags
        ),
        # Of the two loops of a joined matmul the compiler may unroll one alone.
        trips=lambda found: None if is_joined else (Fixed(math.ceil(width / found["BLOCK_K"])),),
        bytes_per_row=(in_and_out + stream) * width + dtype.itemsize * num_outputs * width / rows,
        rows=rows,
        programs=lambda found: (
            math.ceil(rows / found["BLOCK_R"]) * math.ceil(width / found["BLOCK_C"])
        ),
        flops_per_row=2.0 * num_outputs * width,
        types=_TYPES | ({"rows_ptr": "*fp32"} if has_norm else {}),
        aligned=("stride_output",),
        needed=needed,
        is_main=not suffix.startswith(".joined")
        and (dtype, rows, width) == (torch.bfloat16, 200, 1024),
    )


def _embedding(
    rows: int, width: int, dtype: torch.dtype, needed: dict[str, str]
) -> Iterator[Configuration]:
    """Of one position: weights in, embedded state and stream out; then both in, and their norms."""
    suffix = ".fp32" * (dtype == torch.float32) + f".R{rows}.C{width}"
    size, flags = dtype.itemsize, noise_constants(NOISE_SIZE, is_given=False)
    is_main = (dtype, rows, width) == (torch.bfloat16, 200, 1024)
    yield Configuration(
        name=f"energy_head.layer.embed{suffix}",
        kernel=embed_layer_kernel,
        dtype=dtype,
        constants=lambda target: layer_constants(
            "embed", rows, width, dtype, target.name, has_fast_math=target.is_nvidia, **flags
        ),
        trips=lambda found: None,  # a program takes one of two branches
        bytes_per_row=width * (4 + (size * (width + NOISE_SIZE) + 4) / rows),
        rows=rows,
        programs=lambda found: (
            (1 + math.ceil(rows / found["BLOCK_R"])) * math.ceil(width / found["BLOCK_C"])
        ),
        flops_per_row=2 * NOISE_SIZE * width,
        types=_TYPES,
        needed=needed,
        is_main=is_main,
    )
    yield Configuration(
        name=f"energy_head.embedding_norms{suffix}",
        kernel=embedding_norms_kernel,
        dtype=dtype,
        constants=lambda target: embedding_norm_constants(width, target.name),
        trips=lambda found: None,
        bytes_per_row=width * (8 + size + (4 + size) / rows),
        rows=rows,
        programs=lambda found: 1 + math.ceil(rows / found["BLOCK_ROWS"]),
        types=_TYPES,
        is_main=is_main,
    )


def _at(
    rows: int, width: int, dtype: torch.dtype, needed: dict[str, str] = _WARP,
    with_norm: dict[str, str] = _WARP,
) -> Iterator[Configuration]:  # fmt: skip
    yield _layer("silu", rows, width, dtype, with_norm, HAS_NORM=True, IS_JOINED=True)
    yield _layer("silu", rows, width, dtype, needed, HAS_NORM=False, IS_JOINED=False)
    yield _layer("swiglu", rows, width, dtype, needed)
    yield _layer("residual", rows, width, dtype, needed)


def cases() -> Iterator[Configuration]:
    """Every row of the table; widths whose tiles are no power of two, or not filled."""
    yield from _at(1, 1024, torch.bfloat16)
    yield from _at(200, 1024, torch.bfloat16, _GROUP)
    yield from _at(800, 1024, torch.bfloat16, _GROUP, _GROUP)
    yield from _at(1, 2560, torch.bfloat16)
    yield from _at(200, 2560, torch.bfloat16, _GROUP)
    yield from _at(800, 1072, torch.bfloat16, _GROUP, _GROUP)
    yield from _at(200, 2560, torch.float32, {}, {})
    # The first block, whose rows are normalised already.
    for rows, needed in ((1, _WARP), (200, _GROUP), (800, _GROUP)):
        yield _layer("silu", rows, 1024, torch.bfloat16, needed, HAS_NORM=False, IS_JOINED=True)
    yield _layer("silu", 200, 2560, torch.float32, {}, HAS_NORM=False, IS_JOINED=True)
    yield from _embedding(1, 1024, torch.bfloat16, _WARP)
    yield from _embedding(200, 1024, torch.bfloat16, _GROUP)
    yield from _embedding(800, 1072, torch.bfloat16, _GROUP)
    yield from _embedding(200, 2560, torch.float32, {})
