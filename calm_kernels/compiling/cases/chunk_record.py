"""The record of a chunk: one draw, 200 draws of 128 numbers, an answer; numbers in memory; and the
state that moves on.
"""

from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.chunk_record.kernels import (
    advance_constants,
    advance_kernel,
    record_constants,
    record_kernel,
)
from calm_kernels.compiling.configuration import Configuration

__all__ = ["cases"]

PATCH_SIZE, LATENT_SIZE = 4, 128


def _case(
    name: str, draws: int, *, is_answer: bool = False, is_main: bool = False, **types: str
) -> Configuration:
    """A row is a sequence."""
    count = draws * LATENT_SIZE

    def trips(found: dict[str, Any]) -> tuple[int, ...]:
        return () if is_answer else (-(-count // found["BLOCK"]),)

    return Configuration(
        name=f"chunk_record.{name}",
        kernel=record_kernel,
        dtype=torch.bfloat16,
        constants=lambda target: record_constants(PATCH_SIZE, target.name, is_answer=is_answer),
        trips=trips,
        bytes_per_row=8 * (2 * PATCH_SIZE + 5) + (1 if is_answer else 2 * count),
        rows=1,
        types={"tokens_ptr": "*i64", "out_ptr": "*i64"}
        | ({"values_ptr": "*i1"} if is_answer else {})
        | types,
        ones=("stride_l",),
        aligned=("width",),
        is_main=is_main,
    )


def _advance() -> Configuration:
    names = ("record_ptr", "tokens_ptr", "seed_ptr", "lengths_ptr")
    return Configuration(
        name="chunk_record.advance",
        kernel=advance_kernel,
        dtype=torch.bfloat16,
        constants=lambda target: advance_constants(PATCH_SIZE, target.name, has_lengths=True),
        trips=lambda _: (),
        bytes_per_row=8 * (2 * PATCH_SIZE + 4),
        rows=1,
        types=dict.fromkeys(names, "*i64"),
        ones=("stride_number", "stride_token", "stride_offset", "stride_length"),
        is_main=True,
    )


def cases() -> Iterator[Configuration]:
    """Of one draw, of a vote, and of a token; what comes after."""
    yield _case("N1", 1, is_main=True)
    yield _case("N200", 200, num_agreeing="*i64", is_main=True)
    yield _case("answer", 0, is_answer=True, is_fallback="*i1", saved="*i64")
    yield _advance()
