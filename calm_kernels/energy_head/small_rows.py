"""The head forward for few rows, without gradients: four launches a block.

At decoding a product takes as long as its weights take to read, and a launch as long as a product.
So every product carries what stands before and after it, see `small_rows_kernels`.
"""

from typing import Literal

import torch
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.energy_head import launch
from calm_kernels.energy_head.launch import PRODUCT_DTYPES, Constants, Noise
from calm_kernels.energy_head.parameters import NORM_EPS, HeadParameters, Pair
from calm_kernels.energy_head.passes import embed_hidden
from calm_kernels.energy_head.small_rows_kernels import (
    residual_layer_kernel,
    silu_layer_kernel,
    swiglu_layer_kernel,
)
from calm_kernels.tuning import architecture, launch_options, setting, use_fast_math

__all__ = ["Form", "layer_constants", "small_rows_pass"]

_BLOCK_TILES = 32  # whose statistics are in registers at once
Grid = tuple[int, int]
Form = Literal["silu", "swiglu", "residual"]


def small_rows_pass(hidden: Tensor, noise: Noise, head: HeadParameters) -> Tensor:
    """Latents ``[R N, L]`` of hidden states ``[R, C]``, as `passes.forward_pass` gives them."""
    width = hidden.shape[1]
    _, condition = embed_hidden(hidden, head)
    stream, rows = launch.embed(noise, *head.noise_embd, head.norm_noise, head.blocks[0].norm)
    parts: Tensor | None = None  # of the stream, once it is not normalised by what made it
    for block in head.blocks:
        own, shared = block.first.weight.split(width, dim=1)
        context = condition @ shared.T
        features = _silu_layer(rows, Pair(own, block.first.bias), block.norm, parts, context)
        features = _swiglu_layer(_silu_layer(features, block.second), block.gate_up)
        rows, parts = stream, _residual_layer(features, block.down, stream)
    features = _silu_layer(rows, head.final_first, head.final_norm, parts)
    weight, bias = head.final_second
    return torch.addmm(bias.to(features.dtype), features, weight.T)


def layer_constants(
    form: Form, num_rows: int, width: int, dtype: torch.dtype, arch: str, *, has_fast_math: bool,
    can_round: bool = True, **flags: bool,
) -> Constants:  # fmt: skip
    """Of the kernel of this form, with its flags; products as in `launch.embedding_constants`."""
    name = "energy_head.layer" + ".fp32" * (dtype == torch.float32)
    chosen = setting(name + ".norm" * flags.get("HAS_NORM", False), arch, num_rows)
    constants = {
        "WIDTH": width,
        "IS_EVEN": width % chosen.block_features == 0,
        "BLOCK_R": chosen.block_rows,
        "BLOCK_C": chosen.block_outputs,
        "BLOCK_K": chosen.block_features,
        "DOT_DTYPE": PRODUCT_DTYPES[dtype if can_round else torch.float32],
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
    }
    if form != "residual":
        constants["FAST"] = has_fast_math
    if form == "silu":
        tile = setting(name, arch, num_rows).block_outputs  # of the residual layer
        block = min(_BLOCK_TILES, 1 << (-(-width // tile) - 1).bit_length())
        constants |= {"TILE": tile, "BLOCK_T": block, "NORM_EPS": NORM_EPS}
    return constants | flags, launch_options(chosen)


def _constants(form: Form, rows: Tensor, weight: Tensor, **flags: bool) -> tuple[Grid, Constants]:
    num_rows, width = rows.shape
    constants, options = layer_constants(
        form, num_rows, width, weight.dtype, architecture(rows.device),
        has_fast_math=use_fast_math(), can_round=not is_interpreted(), **flags,
    )  # fmt: skip
    grid = (-(-num_rows // constants["BLOCK_R"]), -(-width // constants["BLOCK_C"]))
    return grid, (constants, options)


def _silu_layer(
    rows: Tensor, linear: Pair, norm: Pair | None = None, parts: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """SiLU(weight · x + bias + context), the context ``[R, C]`` for N rows each.

    x is the rows or, with `parts` of them, their LayerNorm.
    """
    weight, bias = linear
    out = weight.new_empty(rows.shape)
    flags = {"HAS_NORM": parts is not None, "HAS_CONTEXT": context is not None}
    grid, (constants, options) = _constants("silu", rows, weight, **flags)
    shared = rows if context is None else context
    silu_layer_kernel[grid](
        rows, rows if parts is None else parts, *(norm or linear), weight, bias, shared, out,
        len(rows), len(rows) // len(shared), weight.stride(0), **constants, **options,
    )  # fmt: skip
    return out


def _swiglu_layer(rows: Tensor, linear: Pair) -> Tensor:
    """SiLU(gate) · up of ``[gate; up] = weight · rows + bias``."""
    weight, bias = linear
    out = torch.empty_like(rows)
    grid, (constants, options) = _constants("swiglu", rows, weight)
    swiglu_layer_kernel[grid](
        rows, weight, bias, out, len(rows), weight.stride(0), **constants, **options
    )
    return out


def _residual_layer(rows: Tensor, linear: Pair, stream: Tensor) -> Tensor:
    """Add weight · rows + bias to the stream; the parts of its statistics ``[2, tiles, rows]``."""
    weight, bias = linear
    grid, (constants, options) = _constants("residual", rows, weight)
    parts = stream.new_empty(2, grid[1], len(rows))
    residual_layer_kernel[grid](
        rows, weight, bias, stream, parts, len(rows), weight.stride(0), **constants, **options
    )
    return parts
