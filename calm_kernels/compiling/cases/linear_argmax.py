"""The argmax over V = 128256 tokens of H = 512 features, on 132 processors."""

from collections.abc import Iterator
from typing import Any

import torch

from calm_kernels.compiling.configuration import Configuration
from calm_kernels.compiling.inspection import Flattened
from calm_kernels.linear_argmax import kernels

__all__ = ["cases"]

VOCAB_SIZE, WIDTH, PROCESSORS = 128_256, 512, 132
_TYPES = {
    "high_ptr": "*fp32",
    "token_ptr": "*i32",
    "total_ptr": "*fp32",
    "index_ptr": "*i64",
    "largest_ptr": "*fp32",
    "logsumexp_ptr": "*fp32",
}


def _splits(rows: int, constants: dict[str, Any], at_once: int) -> tuple[int, int]:
    return kernels.num_splits(rows, VOCAB_SIZE, constants, at_once * PROCESSORS)


def _partial(
    name: str, rows: int, at_once: int, needed: dict[str, str], *, with_total: bool = False,
    dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, is_main: bool = False,
) -> Configuration:  # fmt: skip
    """The first stage; `at_once` programs share a processor."""

    def trips(constants: dict[str, Any]) -> tuple[int, ...] | None:
        blocks = -(-_splits(rows, constants, at_once)[1] // constants["BLOCK_V"])
        steps = -(-width // constants["BLOCK_H"])
        return (Flattened(blocks, steps),) if constants["FAST"] else None

    return Configuration(
        name=f"linear_argmax.{name}",
        kernel=kernels.partial_kernel,
        dtype=dtype,
        constants=lambda target: kernels.constants(
            rows, width, dtype, target.name, with_total=with_total, has_fast_math=target.is_nvidia
        ),
        trips=trips,
        bytes_per_row=dtype.itemsize * width * (VOCAB_SIZE / rows + 1),
        rows=rows,
        programs=lambda constants: (
            _splits(rows, constants, at_once)[0] * -(-rows // constants["BLOCK_R"])
        ),
        flops_per_row=2.0 * VOCAB_SIZE * width,
        types=_TYPES,
        ones=("stride_rh", "stride_vh"),
        aligned=("vocab_size", "width", "stride_r", "stride_v"),
        needed=needed,
        is_main=is_main,
    )


def _reduce(
    name: str, rows: int, splits: int, at_once: int, *, with_total: bool = False
) -> Configuration:
    """The second stage."""
    return Configuration(
        name=f"linear_argmax.reduce.{name}",
        kernel=kernels.reduce_kernel,
        dtype=torch.float32,
        constants=lambda target: kernels.reduce_constants(
            at_once * PROCESSORS,
            target.name,
            with_total=with_total,
            has_fast_math=target.is_nvidia,
        ),
        trips=lambda _: (),
        bytes_per_row=(12 if with_total else 8) * splits + 12,
        rows=rows,
        programs=lambda constants: -(-rows // constants["BLOCK_R"]),
        types=_TYPES,
    )


def cases() -> Iterator[Configuration]:
    """Few, some and many rows; maxima alone or with the log-sum-exp; float32; a width that fills no
    block of features; both sizes of the second stage.
    """
    warp, group = {"sm_90": "HMMA"}, {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    yield _partial("R4", 4, 3, warp, is_main=True)
    yield _partial("R4.logsumexp", 4, 3, warp, with_total=True)
    yield _partial("R64", 64, 2, group)
    yield _partial("R800", 800, 1, group, is_main=True)
    yield _partial("R800.logsumexp", 800, 1, group, with_total=True)
    yield _partial("R800.H500", 800, 1, group, width=500)
    yield _partial("R4.fp32", 4, 2, warp, dtype=torch.float32)
    yield _partial("R800.fp32.logsumexp", 800, 1, group, dtype=torch.float32, with_total=True)
    yield _reduce("R4", 4, 382, 3)
    yield _reduce("R800.logsumexp", 800, 18, 1, with_total=True)
