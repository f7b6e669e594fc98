"""The head forward and backward: library matmuls with fused kernels between them.

The N draws of a position are neighbours in memory, ``[R N, C]``. Matmuls run in the dtype of the
weights, which gradients have too; the residual stream is float32. What depends on the position
alone (the context's half of every block's first matmul) is computed once for its R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm_kernels.energy_head.activation_kernels import (
    silu,
    silu_backward,
    swiglu,
    swiglu_backward,
)
from calm_kernels.energy_head.embedding_kernels import Noise, embed_noise, embed_noise_backward
from calm_kernels.energy_head.gradient_slots import GradientSlots
from calm_kernels.energy_head.norm_kernels import (
    embedding_norms,
    layer_norm,
    layer_norm_backward,
)
from calm_kernels.energy_head.parameters import BlockParameters, HeadParameters
from calm_kernels.energy_head.small_rows_kernels import (
    embed_layer,
    residual_layer,
    silu_layer,
    swiglu_layer,
)
from calm_kernels.tuning import architecture, setting

__all__ = ["Gradients", "SavedActivations", "backward_pass", "forward_pass", "small_rows_pass"]


@dataclass
class SavedActivations:
    """What the forward pass saves for the backward pass."""

    embedded: Tensor  # [R, C]
    context: Tensor  # [R, D C]
    streams: list[Tensor]  # D + 1 of [R N, C], float32: the input of each block and the last
    matmuls: list[Tensor]  # three of each block and one of the last layer; empty: computed again

    def tensors(self) -> list[Tensor]:
        """All of them in a list."""
        return [self.embedded, self.context, *self.streams, *self.matmuls]

    @classmethod
    def of(cls, tensors: list[Tensor], num_blocks: int) -> "SavedActivations":
        """The inverse of `tensors`."""
        embedded, context, *others = tensors
        return cls(embedded, context, others[: num_blocks + 1], others[num_blocks + 1 :])


@dataclass(frozen=True)
class Gradients:
    """Of everything that goes into the head."""

    hidden: Tensor
    noise: Tensor  # [R N, Z], empty if not needed
    matrices: list[Tensor]
    vectors: Tensor  # [GradientSlots.count, C]
    output_bias: Tensor  # [L]


def forward_pass(
    hidden: Tensor, noise: Noise, head: HeadParameters, *, save_streams: bool, save_matmuls: bool
) -> tuple[Tensor, SavedActivations]:
    """Latents ``[R N, L]`` of hidden states ``[R, C]``, weights and hidden states of one dtype."""
    dtype, width = hidden.dtype, hidden.shape[1]
    embedded, condition = _embed_hidden(hidden, head)
    context = _linear(condition, _context_weight(head))
    stream, normed = embed_noise(noise, *head.noise_embd, head.norm_noise, _norms(head)[0])
    saved = SavedActivations(embedded, context, [stream], [])
    for index, block in enumerate(head.blocks):
        matmuls = _block_matmuls(normed, context.narrow(1, index * width, width), block)
        step = _linear(swiglu(matmuls[-1], block.gate_up.bias), block.down.weight)
        after = torch.empty_like(stream) if save_streams else stream
        normed = layer_norm(
            step, block.down.bias, stream, _norms(head)[index + 1], out=after, dtype=dtype
        )
        stream = after
        saved.streams.append(stream)
        if save_matmuls:
            saved.matmuls.extend(matmuls)
        del matmuls  # before the next block's
    last = _linear(normed, head.final_first.weight)
    if save_matmuls:
        saved.matmuls.append(last)
    features = silu(last, head.final_first.bias)
    return _linear(features, *head.final_second), saved


def small_rows_pass(hidden: Tensor, noise: Noise, head: HeadParameters) -> Tensor:
    """As `forward_pass`, for few rows and without gradients: four launches a block.

    At decoding a matmul takes as long as reading its weights, and a launch takes as long as a
    matmul. So each matmul is fused with the work before and after it. The context's half of a first
    weight is multiplied with every draw, in the matmul of the other half: that saves a launch a
    block, and a matmul of few rows waits for its weights in any case.
    """
    embedded, stream = embed_layer(hidden.contiguous(), noise, head.hidden_embd, head.noise_embd)
    condition, rows = embedding_norms(
        embedded, stream, head.norm_hidden, head.norm_noise, head.blocks[0].norm, hidden.dtype
    )
    parts: Tensor | None = None  # statistics of the stream; the first rows are normalised already
    for block in head.blocks:
        features = silu_layer(rows, block.first, block.norm, parts, condition)
        features = swiglu_layer(silu_layer(features, block.second), block.gate_up)
        rows, parts = stream, residual_layer(features, block.down, stream)
    features = silu_layer(rows, head.final_first, head.final_norm, parts)
    weight, bias = head.final_second
    return torch.addmm(bias.to(features.dtype), features, weight.T)


def _embed_hidden(hidden: Tensor, head: HeadParameters) -> tuple[Tensor, Tensor]:
    """The embedded hidden states without bias, and c, their LayerNorm with it; ``[R, C]``."""
    embedded = _linear(hidden, head.hidden_embd.weight)
    bias, norm = head.hidden_embd.bias, head.norm_hidden
    return embedded, layer_norm(embedded, bias, None, norm, dtype=hidden.dtype)


def backward_pass(
    dlatent: Tensor, hidden: Tensor, noise: Noise, head: HeadParameters, saved: SavedActivations,
    *, need_noise: bool,
) -> Gradients:  # fmt: skip
    """Gradients of `forward_pass`."""
    width, slots = hidden.shape[1], GradientSlots(len(head.blocks))
    groups = _num_groups(noise.num_rows, hidden.device)
    sums = hidden.new_empty(groups, slots.count, width, dtype=torch.float32)
    dcontext = torch.empty_like(saved.context)
    dstream, matrices = _last_backward(dlatent, head, saved, sums)
    for index in reversed(range(len(head.blocks))):
        part = slice(index * width, (index + 1) * width)
        context = (saved.context[:, part], dcontext[:, part])
        dstream, found = _block_backward(dstream, head, index, saved, context, sums)
        matrices = found + matrices
    dembedded, condition = layer_norm_backward(
        dcontext @ _context_weight(head), saved.embedded, head.hidden_embd.bias, head.norm_hidden,
        sums[:, slots.hidden],
    )  # fmt: skip
    for index in range(len(head.blocks)):  # the context's half of each first weight
        out = matrices[4 * index][:, width:]
        torch.mm(dcontext[:, index * width : (index + 1) * width].T, condition, out=out)
    dmatmul, drawn = embed_noise_backward(
        noise, *head.noise_embd, head.norm_noise.weight, dstream,
        sums[:, slots.noise : slots.noise + 2],
    )  # fmt: skip
    return Gradients(
        hidden=dembedded @ head.hidden_embd.weight,
        noise=dmatmul @ head.noise_embd.weight if need_noise else hidden.new_empty(0),
        matrices=[dmatmul.T @ drawn, dembedded.T @ hidden, *matrices],
        vectors=sums.sum(dim=0),
        output_bias=dlatent.sum(dim=0, dtype=torch.float32),
    )


def _num_groups(num_rows: int, device: torch.device) -> int:
    """Groups of rows, each with its own sums over rows, in the backward pass."""
    return max(1, min(num_rows, setting("energy_head.groups", architecture(device), 1).block_rows))


def _last_backward(
    dlatent: Tensor, head: HeadParameters, saved: SavedActivations, sums: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the last stream, and of the last layer's weights."""
    slots, stream = GradientSlots(len(head.blocks)), saved.streams[-1]
    if saved.matmuls:
        matmul = saved.matmuls[-1]
    else:
        normed = layer_norm(None, None, stream, head.final_norm, dtype=dlatent.dtype)
        matmul = _linear(normed, head.final_first.weight)
    dmatmul, second_weight = _linear_backward(
        dlatent, head.final_second.weight, silu_backward,
        matmul, head.final_first.bias, sums[:, slots.final],
    )  # fmt: skip
    dstream, first_weight = _linear_backward(
        dmatmul, head.final_first.weight, layer_norm_backward,
        stream, None, head.final_norm, sums[:, slots.norm(len(head.blocks))],
    )  # fmt: skip
    return dstream, [first_weight, second_weight]


def _block_backward(
    dstream: Tensor, head: HeadParameters, index: int, saved: SavedActivations,
    context: tuple[Tensor, Tensor], sums: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradient of the block's input from that of its output, and of its four weights.

    `context` holds the context and its gradient, which is written.
    """
    block, slots = head.blocks[index], GradientSlots(len(head.blocks))
    stream, width = saved.streams[index], dstream.shape[1]
    if saved.matmuls:
        matmuls = saved.matmuls[3 * index : 3 * index + 3]
    else:
        normed = layer_norm(None, None, stream, block.norm, dtype=dstream.dtype)
        matmuls = [*_block_matmuls(normed, context[0], block)]
        del normed
    dmatmul, down_weight = _linear_backward(  # a matmul computed again is freed after its use
        dstream, block.down.weight, swiglu_backward,
        matmuls.pop(), block.gate_up.bias, sums[:, slots.gate_up(index)],
    )  # fmt: skip
    dmatmul, gate_up_weight = _linear_backward(
        dmatmul, block.gate_up.weight, silu_backward,
        matmuls.pop(), block.second.bias, sums[:, slots.second(index)],
    )  # fmt: skip
    dmatmul, second_weight = _linear_backward(
        dmatmul, block.second.weight, silu_backward,
        matmuls.pop(), block.first.bias, sums[:, slots.first(index)], *context,
    )  # fmt: skip
    first_weight = torch.empty_like(block.first.weight)
    dstream, _ = _linear_backward(
        dmatmul, block.first.weight[:, :width], layer_norm_backward,
        stream, None, block.norm, sums[:, slots.norm(index)], dstream, out=first_weight[:, :width],
    )  # fmt: skip
    return dstream, [first_weight, second_weight, gate_up_weight, down_weight]


def _linear_backward(
    dmatmul: Tensor, weight: Tensor, backward: Callable[..., tuple[Tensor, Tensor]],
    *arguments: Any, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Backward through a linear layer and the kernel before it.

    That kernel's `backward` also gives its output again, which the weight's gradient needs. Returns
    the gradients of the kernel's input and of the weight, the latter in `out` if given.
    """
    dinput, features = backward(dmatmul @ weight, *arguments)
    return dinput, torch.mm(dmatmul.T, features, out=out)


def _block_matmuls(
    normed: Tensor, context: Tensor, block: BlockParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's three matmuls, without their biases: first, second, gate and up."""
    first = _linear(normed, block.first.weight[:, : normed.shape[1]])
    second = _linear(silu(first, block.first.bias, context), block.second.weight)
    gate_up = _linear(silu(second, block.second.bias), block.gate_up.weight)
    return first, second, gate_up


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is None:
        return inputs @ weight.T
    return torch.addmm(bias.to(inputs.dtype), inputs, weight.T)


def _norms(head: HeadParameters) -> list:
    """The LayerNorm before each block and before the last layer."""
    return [*(block.norm for block in head.blocks), head.final_norm]


def _context_weight(head: HeadParameters) -> Tensor:
    """The context's half of every block's first weight, ``[D C, C]``."""
    width = head.hidden_embd.weight.shape[0]
    return torch.cat([block.first.weight[:, width:] for block in head.blocks])
