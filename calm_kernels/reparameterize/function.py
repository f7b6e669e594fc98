"""Launches the reparameterization's kernels and teaches autograd and torch.compile about them."""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.reparameterize.kernels import backward_kernel, forward_kernel
from calm_kernels.tuning import architecture, launch_options, setting, use_fast_math

__all__ = ["constants", "reparameterize"]

_ALL, _GIVEN, _DRAWN = 0, 1, 2


def reparameterize(
    latent_states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    kl_floor: float,
    dropout: float,
    seed: Tensor,
    first_row: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Latent ``[..., L]`` and KL divergence ``[...]``; what is not given is drawn in the kernel.

    Args:
        latent_states: ``[..., 2L]``.
        noise: ε, ``[..., L]`` or None.
        keep: bool, ``[..., L]`` or None.
        kl_floor: λ_KL.
        dropout: chance that an element is dropped.
        seed: of `noise.as_seed`; unused where all is given.
        first_row: global index of the first row.
    """
    *batch, width = latent_states.shape
    width //= 2
    if not isinstance(first_row, Tensor):
        first_row = torch.full((), first_row, dtype=torch.int64, device=latent_states.device)
    latent, kl = _forward_op(
        latent_states.reshape(-1, 2 * width),
        None if noise is None else noise.reshape(-1, width),
        None if keep is None else keep.reshape(-1, width),
        seed.contiguous(), first_row, kl_floor, dropout,
    )  # fmt: skip
    return latent.view(*batch, width), kl.view(batch)


def constants(
    width: int, arch: str, *, is_given: bool, keep: int, has_fast_math: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants and compiler options of both kernels."""
    launch = setting("reparameterize", arch, width)
    words = 1 << (-(-width // 8) - 1).bit_length()
    chosen = {
        "WIDTH": width,
        "IS_GIVEN": is_given,
        "KEEP": keep,
        "BLOCK_ROWS": max(1, launch.block_rows * 16 // words),
        "BLOCK_Q": words,
        "FAST": has_fast_math,
    }
    return chosen, launch_options(launch)


def _arguments(
    states: Tensor, noise: Tensor | None, keep: Tensor | None, seed: Tensor, dropout: float
) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], dict[str, Any], dict[str, Any], int]:
    """What both launches share: pointers and strides of the draws, constants, options, grid."""
    mode = _GIVEN if keep is not None else _DRAWN if dropout > 0 else _ALL
    width = states.shape[1] // 2
    chosen, options = constants(
        width, architecture(states.device), is_given=noise is not None, keep=mode,
        has_fast_math=use_fast_math(),
    )  # fmt: skip
    pointers = (states if noise is None else noise, states if keep is None else keep)
    strides = (
        *((0, 0) if noise is None else noise.stride()),
        *((0, 0) if keep is None else keep.stride()),
        0 if seed.dim() == 1 else 2,
    )
    return pointers, strides, chosen, options, -(-states.shape[0] // chosen["BLOCK_ROWS"])


@torch.library.custom_op("calm_kernels::reparameterize", mutates_args=())
def _forward_op(
    states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    seed: Tensor,
    first_row: Tensor,
    kl_floor: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Latent ``[R, L]`` and KL ``[R]`` of states ``[R, 2L]``."""
    num_rows = states.shape[0]
    latent, kl = _forward_outputs(states)
    if num_rows:
        pointers, strides, chosen, options, grid = _arguments(states, noise, keep, seed, dropout)
        with torch.cuda.device_of(states):
            forward_kernel[(grid,)](
                states, *pointers, seed, first_row, latent, kl, num_rows, *states.stride(),
                *strides, kl_floor, dropout, **chosen, **options,
            )  # fmt: skip
    return latent, kl


@torch.library.custom_op("calm_kernels::reparameterize_backward", mutates_args=())
def _backward_op(
    states: Tensor,
    noise: Tensor | None,
    keep: Tensor | None,
    seed: Tensor,
    first_row: Tensor,
    dlatent: Tensor,
    dkl: Tensor,
    kl_floor: float,
    dropout: float,
) -> Tensor:
    """Gradient ``[R, 2L]`` of the states."""
    num_rows = states.shape[0]
    dstates = states.new_empty(states.shape)
    if num_rows:
        pointers, strides, chosen, options, grid = _arguments(states, noise, keep, seed, dropout)
        with torch.cuda.device_of(states):
            backward_kernel[(grid,)](
                states, *pointers, seed, first_row, dlatent, dkl, dstates, num_rows,
                *states.stride(), *strides, *dlatent.stride(), dkl.stride(0), kl_floor, dropout,
                **chosen, **options,
            )  # fmt: skip
    return dstates


def _forward_outputs(states: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = states.shape
    return states.new_empty(num_rows, width // 2), states.new_empty(num_rows, dtype=torch.float32)


@_forward_op.register_fake
def _(states, *options):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    return _forward_outputs(states)


@_backward_op.register_fake
def _(states, *options):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    return states.new_empty(states.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the states and where the draws came from, not the draws."""
    *tensors, ctx.kl_floor, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dlatent: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("reparameterize")
    dstates = _backward_op(*ctx.saved_tensors, dlatent, dkl, ctx.kl_floor, ctx.dropout)
    return dstates, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_save)
