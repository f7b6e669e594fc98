"""The head forward and backward: library products, fused kernels between them.

Rows are patch-major, ``[R N, C]``. Products run in the dtype of the weights, and gradients travel
in it; the residual stream is float32. What depends on the patch alone (the context's half of every
block's first product) is computed for R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm_kernels.energy_head import launch
from calm_kernels.energy_head.launch import Noise
from calm_kernels.energy_head.parameters import BlockParameters, HeadParameters
from calm_kernels.energy_head.sums import Places

__all__ = ["Gradients", "Kept", "backward_pass", "embed_hidden", "forward_pass"]


@dataclass
class Kept:
    """What the forward pass leaves for the backward."""

    embedded: Tensor  # [R, C]
    context: Tensor  # [R, D C]
    streams: list[Tensor]  # D + 1 of [R N, C], float32: the input of each block and the last
    products: list[Tensor]  # three of each block and one of the last layer; empty: computed again

    def tensors(self) -> list[Tensor]:
        """All of them in a list."""
        return [self.embedded, self.context, *self.streams, *self.products]

    @classmethod
    def of(cls, tensors: list[Tensor], num_blocks: int) -> "Kept":
        """The inverse of `tensors`."""
        embedded, context, *others = tensors
        return cls(embedded, context, others[: num_blocks + 1], others[num_blocks + 1 :])


@dataclass(frozen=True)
class Gradients:
    """Of everything that goes into the head."""

    hidden: Tensor
    noise: Tensor  # [R N, Z], empty if not needed
    matrices: list[Tensor]
    vectors: Tensor  # [Places.count, C]
    output_bias: Tensor  # [L]


def forward_pass(
    hidden: Tensor, noise: Noise, head: HeadParameters, *, keep_streams: bool, keep_products: bool
) -> tuple[Tensor, Kept]:
    """Latents ``[R N, L]`` of hidden states ``[R, C]``, weights and hidden states of one dtype."""
    dtype, width = hidden.dtype, hidden.shape[1]
    embedded, condition = embed_hidden(hidden, head)
    context = _product(condition, _context_weight(head))
    stream, normed = launch.embed(noise, *head.noise_embd, head.norm_noise, _norms(head)[0])
    kept = Kept(embedded, context, [stream], [])
    for index, block in enumerate(head.blocks):
        products = _block_products(normed, context.narrow(1, index * width, width), block)
        step = _product(launch.swiglu(products[-1], block.gate_up.bias), block.down.weight)
        after = torch.empty_like(stream) if keep_streams else stream
        normed = launch.norm(
            step, block.down.bias, stream, _norms(head)[index + 1], out=after, dtype=dtype
        )
        stream = after
        kept.streams.append(stream)
        if keep_products:
            kept.products.extend(products)
        del products  # before the next block's
    last = _product(normed, head.final_first.weight)
    if keep_products:
        kept.products.append(last)
    features = launch.silu(last, head.final_first.bias)
    return _product(features, *head.final_second), kept


def embed_hidden(hidden: Tensor, head: HeadParameters) -> tuple[Tensor, Tensor]:
    """The product of the hidden states, and c, its LayerNorm; ``[R, C]``."""
    embedded = _product(hidden, head.hidden_embd.weight)
    bias, norm = head.hidden_embd.bias, head.norm_hidden
    return embedded, launch.norm(embedded, bias, None, norm, dtype=hidden.dtype)


def backward_pass(
    dlatent: Tensor, hidden: Tensor, noise: Noise, head: HeadParameters, kept: Kept,
    *, need_noise: bool,
) -> Gradients:  # fmt: skip
    """Gradients of `forward_pass`."""
    width, at = hidden.shape[1], Places(len(head.blocks))
    groups = launch.num_groups(noise.num_rows, hidden.device)
    sums = hidden.new_empty(groups, at.count, width, dtype=torch.float32)
    dcontext = torch.empty_like(kept.context)
    dstream, matrices = _last_backward(dlatent, head, kept, sums)
    for index in reversed(range(len(head.blocks))):
        place = slice(index * width, (index + 1) * width)
        context = (kept.context[:, place], dcontext[:, place])
        dstream, found = _block_backward(dstream, head, index, kept, context, sums)
        matrices = found + matrices
    dembedded, condition = launch.norm_backward(
        dcontext @ _context_weight(head), kept.embedded, head.hidden_embd.bias, head.norm_hidden,
        sums[:, at.hidden],
    )  # fmt: skip
    for index in range(len(head.blocks)):  # the context's half of each first weight
        out = matrices[4 * index][:, width:]
        torch.mm(dcontext[:, index * width : (index + 1) * width].T, condition, out=out)
    dproduct, drawn = launch.embed_backward(
        noise, *head.noise_embd, head.norm_noise.weight, dstream, sums[:, at.noise : at.noise + 2]
    )
    return Gradients(
        hidden=dembedded @ head.hidden_embd.weight,
        noise=dproduct @ head.noise_embd.weight if need_noise else hidden.new_empty(0),
        matrices=[dproduct.T @ drawn, dembedded.T @ hidden, *matrices],
        vectors=sums.sum(dim=0),
        output_bias=dlatent.sum(dim=0, dtype=torch.float32),
    )


def _last_backward(
    dlatent: Tensor, head: HeadParameters, kept: Kept, sums: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the last stream, and of the last layer's weights."""
    at, stream = Places(len(head.blocks)), kept.streams[-1]
    if kept.products:
        product = kept.products[-1]
    else:
        normed = launch.norm(None, None, stream, head.final_norm, dtype=dlatent.dtype)
        product = _product(normed, head.final_first.weight)
    dproduct, second_weight = _through(
        dlatent, head.final_second.weight, launch.silu_backward,
        product, head.final_first.bias, sums[:, at.final],
    )  # fmt: skip
    dstream, first_weight = _through(
        dproduct, head.final_first.weight, launch.norm_backward,
        stream, None, head.final_norm, sums[:, at.norm(len(head.blocks))],
    )  # fmt: skip
    return dstream, [first_weight, second_weight]


def _block_backward(
    dstream: Tensor, head: HeadParameters, index: int, kept: Kept,
    context: tuple[Tensor, Tensor], sums: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradient of the block's input from that of its output, and of its four weights.

    `context` holds the context and its gradient, which is written.
    """
    block, at = head.blocks[index], Places(len(head.blocks))
    stream, width = kept.streams[index], dstream.shape[1]
    if kept.products:
        products = kept.products[3 * index : 3 * index + 3]
    else:
        normed = launch.norm(None, None, stream, block.norm, dtype=dstream.dtype)
        products = [*_block_products(normed, context[0], block)]
        del normed
    dproduct, down_weight = _through(  # each product is let go as soon as it has served
        dstream, block.down.weight, launch.swiglu_backward,
        products.pop(), block.gate_up.bias, sums[:, at.gate_up(index)],
    )  # fmt: skip
    dproduct, gate_up_weight = _through(
        dproduct, block.gate_up.weight, launch.silu_backward,
        products.pop(), block.second.bias, sums[:, at.second(index)],
    )  # fmt: skip
    dproduct, second_weight = _through(
        dproduct, block.second.weight, launch.silu_backward,
        products.pop(), block.first.bias, sums[:, at.first(index)], *context,
    )  # fmt: skip
    first_weight = torch.empty_like(block.first.weight)
    dstream, _ = _through(
        dproduct, block.first.weight[:, :width], launch.norm_backward,
        stream, None, block.norm, sums[:, at.norm(index)], dstream, out=first_weight[:, :width],
    )  # fmt: skip
    return dstream, [first_weight, second_weight, gate_up_weight, down_weight]


def _through(
    dproduct: Tensor, weight: Tensor, backward: Callable[..., tuple[Tensor, Tensor]],
    *arguments: Any, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Back through a product and the kernel before it, which gives its own output again: gradient
    of that kernel's input, and of the weight, which goes to `out`.
    """
    dinput, features = backward(dproduct @ weight, *arguments)
    return dinput, torch.mm(dproduct.T, features, out=out)


def _block_products(
    normed: Tensor, context: Tensor, block: BlockParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's three products without their biases: first, second, gate and up."""
    first = _product(normed, block.first.weight[:, : normed.shape[1]])
    second = _product(launch.silu(first, block.first.bias, context), block.second.weight)
    gate_up = _product(launch.silu(second, block.second.bias), block.gate_up.weight)
    return first, second, gate_up


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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
