"""Tokens drawn from 128,256 logits; a row is a sequence, of the second kernel a draw."""

from collections.abc import Iterator

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.softmax_draws.kernels import (
    draw_constants,
    draw_kernel,
    split_constants,
    split_kernel,
)

__all__ = ["cases"]

VOCAB_SIZE = 128_256
_TYPES = {
    "high_ptr": "*fp32", "total_ptr": "*fp64", "uniforms_ptr": "*fp64", "seed_ptr": "*i64",
    "token_ptr": "*i64", "finite_ptr": "*i1", "temperature": "fp32",
}  # fmt: skip


def _splits(rows: int, dtype: torch.dtype) -> Configuration:
    """Logits in."""
    return Configuration(
        name=f"softmax_draws.splits.R{rows}{'.fp32' * (dtype == torch.float32)}",
        kernel=split_kernel,
        dtype=dtype,
        constants=lambda target: split_constants(target.name),
        trips=lambda _: (),
        bytes_per_row=dtype.itemsize * VOCAB_SIZE,
        rows=rows,
        programs=lambda found: rows * -(-VOCAB_SIZE // found["BLOCK_V"]),
        types=_TYPES,
        aligned=("vocab_size", "stride_r"),
        is_main=dtype == torch.bfloat16,
    )


def _draw(*, is_greedy: bool = False, is_given: bool = False) -> Configuration:
    """One split in, and the parts of all."""
    form = ".greedy" * is_greedy + ".given" * is_given
    return Configuration(
        name=f"softmax_draws.draw{form}",
        kernel=draw_kernel,
        dtype=torch.bfloat16,
        constants=lambda target: draw_constants(
            VOCAB_SIZE, target.name, is_greedy=is_greedy, is_given=is_given
        ),
        trips=lambda _: (),
        bytes_per_row=2 * 1024 + 12 * VOCAB_SIZE / 1024,
        rows=1,
        types=_TYPES,
        aligned=("vocab_size", "stride_r"),
        is_main=not form,
    )


def cases() -> Iterator[Configuration]:
    """Logits of both dtypes; numbers that are drawn, given, or not needed."""
    yield _splits(64, torch.bfloat16)
    yield _splits(64, torch.float32)
    yield _draw()
    yield _draw(is_given=True)
    yield _draw(is_greedy=True)
