"""Losses and gradients of 32768 rows of V = 128256 logits."""

from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.linear_cross_entropy.kernels import loss_constants, loss_kernel

__all__ = ["cases"]

ROWS, VOCAB_SIZE = 32_768, 128_256


def _case(
    name: str, dtype: torch.dtype, *, vocab_size: int = VOCAB_SIZE, need_gradient: bool = True,
    budget: int | None = None, is_main: bool = False,
) -> Configuration:  # fmt: skip
    """Traffic of one read, and of writing the gradient: the second read comes from the cache."""

    def trips(constants: dict[str, Any]) -> tuple[int, ...] | None:
        reads = -(-vocab_size // (constants["LANES"] * constants["INNER"]))
        if not constants["FAST"]:
            return None
        # 0: the loop that clears ignored rows
        return (0, reads, reads) if need_gradient else (reads,)

    return Configuration(
        name=f"linear_cross_entropy.{name}",
        kernel=loss_kernel,
        dtype=dtype,
        constants=lambda target: loss_constants(
            vocab_size,
            dtype,
            target.name,
            need_gradient=need_gradient,
            has_fast_math=target.is_nvidia,
        ),
        trips=trips,
        bytes_per_row=dtype.itemsize * vocab_size * (2 if need_gradient else 1),
        rows=ROWS,
        budget=budget,
        types={"labels_ptr": "*i64", "losses_ptr": "*fp32", "scale": "fp32"},
        aligned=("vocab_size", "stride_r"),
        is_main=is_main,
    )


def cases() -> Iterator[Configuration]:
    """With gradient and without; small and odd vocabularies; float32."""
    bf16 = torch.bfloat16
    yield _case("gradient", bf16, budget=115_000, is_main=True)
    yield _case("loss", bf16, need_gradient=False)
    yield _case("gradient.V8192", bf16, vocab_size=8192)
    yield _case("gradient.fp16", torch.float16)
    yield _case("gradient.fp32", torch.float32)
