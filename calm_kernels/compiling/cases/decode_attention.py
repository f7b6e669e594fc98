"""Attention of a decode step: one sequence with its cache in parts, 64 of them without, and heads
that share keys.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.inspection import Fixed
from calm_kernels.decode_attention.kernels import attention_constants, attention_kernel

__all__ = ["cases"]

CAPACITY = 512
_TYPES = {
    "rotation_ptr": "*fp32", "lengths_ptr": "*i64", "sums_ptr": "*fp32",
    "parts_ptr": "*fp32", "arrivals_ptr": "*i32", "scale": "fp32",
}  # fmt: skip


def _case(
    name: str, batch: int, splits: int, *, kv_heads: int = 16, group: int = 1, size: int = 64,
    dtype: torch.dtype = torch.bfloat16, is_main: bool = False,
) -> Configuration:  # fmt: skip
    """A row is a sequence whose cache is full."""

    def trips(found: dict[str, Any]) -> tuple[int, ...] | None:
        if not found["FAST"]:
            return None
        blocks = math.ceil(math.ceil(CAPACITY / splits) / found["BLOCK_N"])
        return (blocks, Fixed(splits - 1)) if splits > 1 else (blocks,)

    return Configuration(
        name=f"decode_attention.{name}",
        kernel=attention_kernel,
        dtype=dtype,
        constants=lambda target: attention_constants(
            size, kv_heads, group, splits, dtype, target.name, has_fast_math=target.is_nvidia
        ),
        trips=trips,
        bytes_per_row=2.0 * dtype.itemsize * kv_heads * size * CAPACITY,
        rows=batch,
        programs=lambda _: batch * kv_heads * splits,
        flops_per_row=4.0 * kv_heads * group * size * CAPACITY,
        types=_TYPES,
        is_main=is_main,
    )  # fmt: skip


def cases() -> Iterator[Configuration]:
    """CALM-M, Transformer-S (heads of 48 features), eight heads a key, wide heads, float32."""
    yield _case("B1", 1, 8, is_main=True)
    yield _case("B64", 64, 1)
    yield _case("D48", 1, 8, size=48)
    yield _case("G8.D128", 1, 16, kv_heads=8, group=8, size=128)
    yield _case("G20.D256", 4, 4, kv_heads=2, group=20, size=256)
    yield _case("fp32", 1, 8, dtype=torch.float32)
