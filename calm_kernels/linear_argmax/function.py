"""Launches the argmax kernels; nothing here is differentiable."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.linear_argmax.kernels import partial_kernel, reduce_kernel
from calm_kernels.tuning import (
    architecture,
    launch_options,
    num_processors,
    setting,
    use_fast_math,
)

__all__ = ["constants", "linear_argmax", "num_splits", "reduce_constants"]

# A program of the second stage holds this many entries.
_REDUCE_ENTRIES = 4096
# Numbers of waves tried beyond the fewest, so that the last wave leaves no processors idle.
_MORE_WAVES = 7


def linear_argmax(
    rows: Tensor, weight: Tensor, with_logsumexp: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, largest entry and log-sum-exp of rows ``[R, H]`` times weight ``[V, H]``, ``[R]``."""
    index, largest, logsumexp = _argmax_op(rows, weight.to(rows.dtype), with_logsumexp)
    return index, largest, logsumexp if with_logsumexp else None


def constants(
    num_rows: int, width: int, dtype: torch.dtype, arch: str, *, with_total: bool,
    has_fast_math: bool, can_round: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Compile-time constants and compiler options of the first stage.

    float32 is multiplied as three tf32 matmuls, whose error is that of float32 (AMD: float32). The
    interpreter multiplies 16-bit numbers in float32 (`can_round` is False), because it would read
    their bits as integers.
    """
    launch = setting(_operation(dtype), arch, num_rows)
    is_rounded = dtype.itemsize == 2 and can_round
    half = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    chosen = {
        "IS_EVEN": width % launch.block_features == 0,
        "WITH_TOTAL": with_total,
        "BLOCK_R": launch.block_rows,
        "BLOCK_V": launch.block_vocab,
        "BLOCK_H": launch.block_features,
        "DOT_DTYPE": half if is_rounded else tl.float32,
        "PRECISION": "tf32x3" if has_fast_math else "ieee",
        "FAST": has_fast_math,
    }
    return chosen, launch_options(launch)


def reduce_constants(
    slots: int, *, with_total: bool, has_fast_math: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants and compiler options of the second stage, for at most `slots` splits.

    The number of splits changes with that of rows; nothing is compiled again for it.
    """
    block = 1 << (slots - 1).bit_length()
    chosen = {
        "WITH_TOTAL": with_total,
        "BLOCK_S": block,
        "BLOCK_R": max(1, min(16, _REDUCE_ENTRIES // block)),
        "FAST": has_fast_math,
    }
    return chosen, {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def num_splits(
    num_rows: int, vocab_size: int, chosen: dict[str, Any], slots: int
) -> tuple[int, int]:
    """Splits of the vocabulary, at most `slots`, and the tokens in each.

    The programs fill one wave of `slots`, or the number of waves that is done soonest. With one
    block of rows reading the weight takes all the time, and splits are cut to 16 tokens.
    """
    row_blocks = -(-num_rows // chosen["BLOCK_R"])
    granule = chosen["BLOCK_V"] if row_blocks > 1 else 16

    def tokens_of(waves: int) -> int:
        tokens = -(-vocab_size // max(1, waves * slots // row_blocks))
        return -(-tokens // granule) * granule

    def time(waves: int) -> int:
        """In tokens that a processor reads; starting a program costs about one block."""
        tokens = tokens_of(waves)
        programs = row_blocks * -(-vocab_size // tokens)
        return -(-programs // slots) * (tokens + granule)

    fewest = -(-row_blocks // slots)
    tokens = tokens_of(min(range(fewest, min(fewest + _MORE_WAVES, row_blocks) + 1), key=time))
    return -(-vocab_size // tokens), tokens


def _operation(dtype: torch.dtype) -> str:
    return "linear_argmax.fp32" if dtype == torch.float32 else "linear_argmax"


@torch.library.custom_op("calm_kernels::linear_argmax", mutates_args=())
def _argmax_op(rows: Tensor, weight: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Index, largest entry and log-sum-exp (empty if not asked for)."""
    index, largest, logsumexp = _outputs(rows, with_logsumexp)
    (num_rows, width), vocab_size = rows.shape, weight.shape[0]
    if not num_rows:
        return index, largest, logsumexp
    arch, has_fast_math = architecture(rows.device), use_fast_math()
    chosen, options = constants(
        num_rows, width, rows.dtype, arch, with_total=with_logsumexp, has_fast_math=has_fast_math,
        can_round=not is_interpreted(),
    )  # fmt: skip
    at_once = setting(_operation(rows.dtype), arch, num_rows).programs_per_processor
    slots = at_once * num_processors(rows.device)
    splits, tokens = num_splits(num_rows, vocab_size, chosen, slots)
    high, token, total = _partials(rows, splits, with_logsumexp)
    grid = (-(-num_rows // chosen["BLOCK_R"]), splits)
    with torch.cuda.device_of(rows):
        partial_kernel[grid](
            rows, weight, high, token, total, num_rows, vocab_size, tokens, width, *rows.stride(),
            *weight.stride(), **chosen, **options,
        )  # fmt: skip
        chosen, options = reduce_constants(
            slots, with_total=with_logsumexp, has_fast_math=has_fast_math
        )
        reduce_kernel[(-(-num_rows // chosen["BLOCK_R"]),)](
            high, token, total, index, largest, logsumexp, num_rows, splits, **chosen, **options
        )
    return index, largest, logsumexp


def _outputs(rows: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = rows.shape[0]
    return (
        rows.new_empty(num_rows, dtype=torch.int64),
        rows.new_empty(num_rows, dtype=torch.float32),
        rows.new_empty(num_rows if with_logsumexp else 0, dtype=torch.float32),
    )


def _partials(rows: Tensor, splits: int, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, its token and the sum of exponentials of each split and row."""
    shape = (splits, rows.shape[0])
    return (
        rows.new_empty(shape, dtype=torch.float32),
        rows.new_empty(shape, dtype=torch.int32),
        rows.new_empty(shape if with_logsumexp else (0,), dtype=torch.float32),
    )


@_argmax_op.register_fake
def _(rows: Tensor, weight: Tensor, with_logsumexp: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(rows, with_logsumexp)
