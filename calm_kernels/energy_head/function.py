"""The head as one custom op each way, for autograd and torch.compile."""

from typing import Any

import torch
from torch import Tensor

from calm_kernels.autograd import refuse_second_derivative
from calm_kernels.energy_head.embedding_kernels import Noise
from calm_kernels.energy_head.gradient_slots import GradientSlots, join_gradients
from calm_kernels.energy_head.parameters import (
    HeadParameters,
    flatten_parameters,
    unflatten_parameters,
)
from calm_kernels.energy_head.passes import (
    SavedActivations,
    backward_pass,
    forward_pass,
    small_rows_pass,
)
from calm_kernels.noise import Seed, as_seed, split_first_row
from calm_kernels.operators import operator
from calm_kernels.tuning import fuses_head

__all__ = ["energy_head_triton"]

_SAVE_NOTHING, _SAVE_STREAMS, _SAVE_ALL = 0, 1, 2


def energy_head_triton(
    hidden: Tensor,
    noise: Tensor | None,
    head: HeadParameters,
    recompute: bool,
    dtype: torch.dtype,
    num_draws: int,
    seed: Seed,
    first_row: int | Tensor,
    noise_scale: float,
) -> Tensor:
    """Latents ``[N, R, L]``, a view of ``[R, N, L]``; noise that is not given is drawn.

    Args:
        hidden: ``[R, C]``.
        noise: ``[N, R, Z]`` or None.
        head: its parameters.
        recompute: save the residual stream alone for the backward pass.
        dtype: of matmuls and latents.
        num_draws: N.
        seed: see `noise.as_seed`; unused for given noise.
        first_row: global index of the first row.
        noise_scale: factor on drawn noise.
    """
    seeds, row, row_number = None, None, 0
    if noise is None:
        seeds = as_seed(seed, hidden.device).contiguous()
        if seeds.dim() == 2 and len(seeds) != len(hidden):
            raise ValueError(f"seed has {len(seeds)} rows for {len(hidden)} rows of noise")
        row, row_number = split_first_row(first_row, hidden.device)
    # Here and not in the operator, whose backward pass would cast every weight again.
    hidden = hidden.to(dtype)
    parameters = [_cast(parameter, dtype) for parameter in flatten_parameters(head)]
    needed = [hidden, *parameters] if noise is None else [hidden, noise, *parameters]
    save = _SAVE_NOTHING
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needed):
        save = _SAVE_STREAMS if recompute else _SAVE_ALL
    latent, _ = _forward_op(
        hidden, noise, parameters, seeds, row, row_number, num_draws, noise_scale, save
    )
    return latent.unflatten(0, (hidden.shape[0], num_draws)).transpose(0, 1)


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of the matmuls, a vector as it is."""
    return (parameter.to(dtype) if parameter.dim() == 2 else parameter).contiguous()


def _noise(
    hidden: Tensor, noise: Tensor | None, seed: Tensor | None, row: Tensor | None,
    row_number: int, num_draws: int, noise_scale: float,
) -> Noise:  # fmt: skip
    """Its first row is that in memory, or the number."""
    first_row = row_number if row is None else row
    return Noise(noise, seed, first_row, num_draws, hidden.shape[0], noise_scale)


@torch.library.custom_op("calm_kernels::energy_head", mutates_args=())
def _forward_op(
    hidden: Tensor,
    noise: Tensor | None,
    parameters: list[Tensor],
    seed: Tensor | None,
    row: Tensor | None,
    row_number: int,
    num_draws: int,
    noise_scale: float,
    save: int,
) -> tuple[Tensor, list[Tensor]]:
    """Latents ``[R N, L]``, and what the backward pass needs."""
    inputs = (
        hidden,
        _noise(hidden, noise, seed, row, row_number, num_draws, noise_scale),
        unflatten_parameters(parameters),
    )
    with torch.cuda.device_of(hidden):
        if not save and fuses_head(len(hidden) * num_draws, hidden.shape[1]):
            return small_rows_pass(*inputs), []
        latent, saved = forward_pass(
            *inputs,
            save_streams=save >= _SAVE_STREAMS,
            save_matmuls=save == _SAVE_ALL,
        )
    return latent, saved.tensors() if save else []


@operator("energy_head_backward")
def _backward_op(
    dlatent: Tensor,
    hidden: Tensor,
    noise: Tensor | None,
    parameters: list[Tensor],
    seed: Tensor | None,
    row: Tensor | None,
    row_number: int,
    saved: list[Tensor],
    num_draws: int,
    noise_scale: float,
    need_noise: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of hidden states, noise ``[R N, Z]``, weights, vectors and the last bias."""
    head = unflatten_parameters(parameters)
    with torch.cuda.device_of(hidden):
        found = backward_pass(
            dlatent,
            hidden,
            _noise(hidden, noise, seed, row, row_number, num_draws, noise_scale),
            head,
            SavedActivations.of(saved, len(head.blocks)),
            need_noise=need_noise,
        )
    return found.hidden, found.noise, found.matrices, found.vectors, found.output_bias


@_forward_op.register_fake
def _(
    hidden: Tensor, noise: Tensor | None, parameters: list[Tensor],
    seed: Tensor | None, row: Tensor | None, row_number: int, num_draws: int, noise_scale: float,
    save: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    head = unflatten_parameters(parameters)
    num_positions, width = hidden.shape
    num_rows, num_blocks = num_positions * num_draws, len(head.blocks)

    def empty(rows: int, columns: int, kind: torch.dtype | None = None) -> Tensor:
        return hidden.new_empty(rows, columns, dtype=kind)

    saved: list[Tensor] = []
    if save:
        saved = [empty(num_positions, width), empty(num_positions, num_blocks * width)]
        saved += [empty(num_rows, width, torch.float32) for _ in range(num_blocks + 1)]
    if save == _SAVE_ALL:
        widths = [*(width, width, 2 * width) * num_blocks, width]
        saved += [empty(num_rows, columns) for columns in widths]
    return empty(num_rows, head.final_second.weight.shape[0]), saved


@_backward_op.register_fake
def _(
    dlatent: Tensor, hidden: Tensor, noise: Tensor | None, parameters: list[Tensor],
    seed: Tensor | None, row: Tensor | None, row_number: int, saved: list[Tensor], num_draws: int,
    noise_scale: float, need_noise: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    head = unflatten_parameters(parameters)
    noise_size = head.noise_embd.weight.shape[1]
    shape = (len(dlatent), noise_size) if need_noise else (0,)
    vectors = hidden.new_empty(
        GradientSlots(len(head.blocks)).count, hidden.shape[1], dtype=torch.float32
    )
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        dlatent.new_empty(shape),
        [parameter.new_empty(parameter.shape) for parameter in parameters if parameter.dim() == 2],
        vectors,
        dlatent.new_empty(dlatent.shape[1], dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    hidden, noise, parameters, seed, row, *numbers, _ = inputs
    ctx.row_number, ctx.num_draws, ctx.noise_scale = numbers
    _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # zeros in place of gradients of all that is saved
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(hidden, noise, seed, row, *parameters, *saved)


def _backward(ctx: Any, dlatent: Tensor | None, _: list[Tensor]) -> tuple[Any, ...]:
    refuse_second_derivative("the energy head")
    if dlatent is None:  # what follows the head has no gradient
        return None, None, [None] * ctx.num_parameters, *[None] * 6
    hidden, noise, seed, row, *others = ctx.saved_tensors
    parameters, saved = others[: ctx.num_parameters], others[ctx.num_parameters :]
    need_noise = ctx.needs_input_grad[1]
    dhidden, dnoise, matrices, vectors, output_bias = _backward_op(
        dlatent.contiguous(), hidden, noise, parameters, seed, row, ctx.row_number, saved,
        ctx.num_draws, ctx.noise_scale, need_noise,
    )  # fmt: skip
    num_blocks = len(unflatten_parameters(parameters).blocks)
    gradients = [
        gradient.to(parameter.dtype)
        for gradient, parameter in zip(
            join_gradients(matrices, vectors, output_bias, num_blocks), parameters, strict=True
        )
    ]
    if need_noise:
        dnoise = dnoise.unflatten(0, (len(hidden), ctx.num_draws)).transpose(0, 1).to(noise.dtype)
    return dhidden, dnoise if need_noise else None, gradients, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_save)
