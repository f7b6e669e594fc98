"""The vote as custom ops for torch.compile; nothing here is differentiable."""

import torch
from torch import Tensor

from calm_kernels.agreeing_patch.eager import choose
from calm_kernels.agreeing_patch.kernels import write_choices, write_counts
from calm_kernels.agreeing_patch.votes import draw_votes, split_power
from calm_kernels.noise import split_first_row
from calm_kernels.operators import operator

__all__ = ["agreeing_patch_triton"]

# One program of the second kernel holds a sequence's candidates; torch chooses among more.
MAX_CANDIDATES = 4096


def agreeing_patch_triton(
    candidates: Tensor,  # [B, N, K]
    power: Tensor,  # [B]
    seed: Tensor,  # [2] or [B, 2]
    first_row: int | Tensor,
    is_factory: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, K]``, level ``[B]`` and counts ``[B, N]``, in two launches.

    A count is negative where its chunk occurred before; see `calm_kernels.agreeing_patch`.
    """
    counts = _count_op(candidates)
    if candidates.shape[1] > MAX_CANDIDATES:
        votes = draw_votes(power, seed, first_row)
        index, level = choose(
            counts.abs().to(torch.int64), counts > 0, *split_power(power), votes, is_factory
        )
        rows = torch.arange(len(power), device=candidates.device)
        return candidates[rows, index], level, counts
    row, number = split_first_row(first_row, candidates.device)
    tokens, level = _choose_op(
        candidates, counts, power, seed.contiguous(), row, number, is_factory
    )
    return tokens, level, counts


@operator("count_chunks")
def _count_op(candidates: Tensor) -> Tensor:
    """Signed counts ``[B, N]`` of ``[B, N, K]``."""
    counts = _counts(candidates)
    if len(candidates):
        write_counts(candidates, counts)
    return counts


@operator("choose_chunk")
def _choose_op(
    candidates: Tensor,
    counts: Tensor,
    power: Tensor,
    seed: Tensor,
    row: Tensor | None,
    row_number: int,
    is_factory: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, K]`` and level ``[B]``; the first row is that in memory, or the number."""
    tokens, level = _choices(candidates)
    if len(candidates):
        first_row = row_number if row is None else row
        write_choices(
            candidates, counts, power, seed, first_row, tokens, level, is_factory=is_factory
        )
    return tokens, level


def _counts(candidates: Tensor) -> Tensor:
    return candidates.new_empty(candidates.shape[:2], dtype=torch.int32)


def _choices(candidates: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, patch_size = candidates.shape
    level = candidates.new_empty(batch, dtype=torch.int64)
    return candidates.new_empty(batch, patch_size), level


@_count_op.register_fake
def _(candidates: Tensor) -> Tensor:
    return _counts(candidates)


@_choose_op.register_fake
def _(
    candidates: Tensor,
    counts: Tensor,
    power: Tensor,
    seed: Tensor,
    row: Tensor | None,
    row_number: int,
    is_factory: bool,
) -> tuple[Tensor, Tensor]:
    return _choices(candidates)
