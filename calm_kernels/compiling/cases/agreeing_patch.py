"""A vote of one sequence among 200 candidates of K = 4 tokens; instructions are of the sequence."""

from collections.abc import Iterator

import torch

from calm_kernels.agreeing_patch import kernels
from calm_kernels.compiling.configuration import Configuration

__all__ = ["cases"]

NUM_CANDIDATES, PATCH_SIZE = 200, 4
_TYPES = {
    "candidates_ptr": "*i64",
    "tokens_ptr": "*i64",
    "counts_ptr": "*i32",
    "power_ptr": "*fp64",
    "seed_ptr": "*i64",
    "level_ptr": "*i64",
}


def _count(
    name: str, num_candidates: int, patch_size: int, *, budget: int | None = None,
    is_main: bool = False,
) -> Configuration:  # fmt: skip
    return Configuration(
        name=f"agreeing_patch.count{name}",
        kernel=kernels.count_kernel,
        dtype=torch.int64,
        constants=lambda target: kernels.count_constants(patch_size, target.name),
        trips=lambda constants: (
            -(-num_candidates // constants["BLOCK_OTHER"]),
            *[patch_size // constants["UNROLL"]] * (patch_size > constants["UNROLL"]),
        ),
        bytes_per_row=num_candidates * (8 * patch_size + 4),
        rows=1,
        programs=lambda constants: -(-num_candidates // constants["BLOCK_N"]),
        budget=budget,
        types=_TYPES,
        ones=("stride_k",),
        is_main=is_main,
    )


def _choose(
    name: str, num_candidates: int, *, budget: int | None = None, is_main: bool = False
) -> Configuration:
    return Configuration(
        name=f"agreeing_patch.choose{name}",
        kernel=kernels.choose_kernel,
        dtype=torch.int64,
        constants=lambda target: kernels.choose_constants(
            num_candidates, PATCH_SIZE, target.name, is_factory=True
        ),
        trips=lambda _: (),
        bytes_per_row=4 * num_candidates + 16 * PATCH_SIZE + 48,
        rows=1,
        budget=budget,
        types=_TYPES,
        ones=("stride_k",),
        is_main=is_main,
    )


def cases() -> Iterator[Configuration]:
    """Both launches at the reference size; more candidates, longer patches."""
    yield _count("", NUM_CANDIDATES, PATCH_SIZE, budget=60000, is_main=True)
    yield _count(".N1024", 1024, PATCH_SIZE)
    yield _count(".K64", NUM_CANDIDATES, 64)
    yield _choose("", NUM_CANDIDATES, budget=3000, is_main=True)
    yield _choose(".N4096", 4096)
