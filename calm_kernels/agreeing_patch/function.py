"""Launches the voting kernels and teaches torch.compile about them."""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.agreeing_patch.kernels import choose_kernel, count_kernel
from calm_kernels.tuning import architecture, launch_options, setting

__all__ = ["agreeing_patch", "choose_constants", "count", "count_constants"]

MAX_UNROLL = 8  # tokens that are compared without a loop
Constants = tuple[dict[str, Any], dict[str, Any]]


def agreeing_patch(
    candidates: Tensor, power: Tensor, seed: Tensor, first_row: int | Tensor, is_factory: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, K]``, level ``[B]`` and the counts of `count`, in two launches.

    Args:
        candidates: ``[B, N, K]``, any strides.
        power: s of each row, float64 ``[B]``, any stride.
        seed: of `noise.as_seed`.
        first_row: global index of the first row.
        is_factory: the form for s that is not whole.
    """
    if not isinstance(first_row, Tensor):
        first_row = torch.full((), first_row, dtype=torch.int64, device=candidates.device)
    counts = count(candidates)
    tokens, level = _choose_op(candidates, counts, power, seed.contiguous(), first_row, is_factory)
    return tokens, level, counts


def count(candidates: Tensor) -> Tensor:
    """How often each candidate's patch occurs, int32 ``[B, N]``; negative if it occurred before."""
    return _count_op(candidates)


def count_constants(patch_size: int, arch: str) -> Constants:
    """Compile-time constants and compiler options of `count_kernel`."""
    launch = setting("agreeing_patch.count", arch, patch_size)
    chosen = {
        "PATCH_SIZE": patch_size,
        "UNROLL": max(step for step in range(1, MAX_UNROLL + 1) if patch_size % step == 0),
        "BLOCK_N": launch.block_n,
        "BLOCK_OTHER": launch.block_rows,
    }
    return chosen, launch_options(launch)


def choose_constants(
    num_candidates: int, patch_size: int, arch: str, *, is_factory: bool
) -> Constants:
    """Compile-time constants and compiler options of `choose_kernel`."""
    launch = setting("agreeing_patch.choose", arch, num_candidates)
    chosen = {
        "IS_FACTORY": is_factory,
        "PATCH_SIZE": patch_size,
        "BLOCK_K": _power_of_two(patch_size),
        "BLOCK": _power_of_two(num_candidates),
    }
    return chosen, launch_options(launch)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@torch.library.custom_op("calm_kernels::count_patches", mutates_args=())
def _count_op(candidates: Tensor) -> Tensor:
    """Signed counts ``[B, N]`` of ``[B, N, K]``."""
    batch, num_candidates, patch_size = candidates.shape
    counts = _counts(candidates)
    if batch:
        chosen, options = count_constants(patch_size, architecture(candidates.device))
        grid = (batch, -(-num_candidates // chosen["BLOCK_N"]))
        with torch.cuda.device_of(candidates):
            count_kernel[grid](
                candidates, counts, num_candidates, *candidates.stride(), **chosen, **options
            )
    return counts


@torch.library.custom_op("calm_kernels::choose_patch", mutates_args=())
def _choose_op(
    candidates: Tensor,
    counts: Tensor,
    power: Tensor,
    seed: Tensor,
    first_row: Tensor,
    is_factory: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, K]`` and level ``[B]``."""
    batch, num_candidates, patch_size = candidates.shape
    tokens, level = _choices(candidates)
    if batch:
        chosen, options = choose_constants(
            num_candidates, patch_size, architecture(candidates.device), is_factory=is_factory
        )
        stride_seed = 0 if seed.dim() == 1 else 2
        with torch.cuda.device_of(candidates):
            choose_kernel[(batch,)](
                candidates, counts, power, seed, first_row, tokens, level, num_candidates,
                *candidates.stride(), power.stride(0), stride_seed, **chosen, **options,
            )  # fmt: skip
    return tokens, level


def _counts(candidates: Tensor) -> Tensor:
    return candidates.new_empty(candidates.shape[:2], dtype=torch.int32)


def _choices(candidates: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, patch_size = candidates.shape
    level = candidates.new_empty(batch, dtype=torch.int64)
    return candidates.new_empty(batch, patch_size), level


@_count_op.register_fake
def _(candidates):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _counts(candidates)


@_choose_op.register_fake
def _(candidates, *options):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    return _choices(candidates)
