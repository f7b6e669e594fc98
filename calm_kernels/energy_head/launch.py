"""Launches of the head's kernels: constants, grids, buffers.

Compile-time constants come from functions of their own, which the compile report shares.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from calm_kernels.backend import is_interpreted
from calm_kernels.energy_head.activation_kernels import (
    silu_backward_kernel,
    silu_kernel,
    swiglu_backward_kernel,
    swiglu_kernel,
)
from calm_kernels.energy_head.embedding_kernels import embed_backward_kernel, embed_kernel
from calm_kernels.energy_head.norm_kernels import norm_backward_kernel, norm_kernel
from calm_kernels.energy_head.parameters import NORM_EPS, Pair
from calm_kernels.tuning import architecture, fuses_head, launch_options, setting, use_fast_math

__all__ = [
    "PRODUCT_DTYPES",
    "Constants",
    "Noise",
    "activation_constants",
    "embed",
    "embed_backward",
    "embedding_constants",
    "norm",
    "norm_backward",
    "norm_constants",
    "num_groups",
    "silu",
    "silu_backward",
    "swiglu",
    "swiglu_backward",
]

Constants = tuple[dict[str, Any], dict[str, Any]]
PRODUCT_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Noise:
    """Noise of every row: given ``[N, R, Z]``, or drawn, N draws for each of R patches."""

    given: Tensor | None
    seed: Tensor
    first_row: Tensor
    num_draws: int
    num_patches: int
    scale: float

    @property
    def num_rows(self) -> int:
        """N R."""
        return self.num_draws * self.num_patches

    def arguments(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Pointers and strides, as the kernels take them."""
        given = self.seed if self.given is None else self.given
        strides = (0, 0, 0) if self.given is None else self.given.stride()
        stride_seed = 0 if self.seed.dim() == 1 else 2
        return (given, self.seed, self.first_row), (*strides, stride_seed)


def _chunks(width: int, largest: int) -> dict[str, int]:
    """A row of `width` as chunks of a power of two that divides it, if one of 64 or more does."""
    divisor = width & -width
    block = 1 << (width - 1).bit_length()
    chunk = min(largest, divisor if divisor >= 64 else block)
    return {"WIDTH": width, "CHUNK": chunk, "NUM_CHUNKS": -(-width // chunk)}


def norm_constants(width: int, arch: str, *, is_backward: bool) -> Constants:
    """Of `norm_kernel` or `norm_backward_kernel`, flags apart."""
    launch = setting("energy_head.norm" + ".backward" * is_backward, arch, width)
    constants = _chunks(width, 1024) | {"BLOCK_ROWS": launch.block_rows, "NORM_EPS": NORM_EPS}
    return constants, launch_options(launch)


def activation_constants(width: int, arch: str, *, has_fast_math: bool) -> Constants:
    """Of the SiLU and SwiGLU kernels, flags apart."""
    launch = setting("energy_head.activation", arch, width)
    block = min(256, 1 << (width - 1).bit_length())
    constants = {
        "WIDTH": width,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_COLUMNS": block,
        "FAST": has_fast_math,
    }
    return constants, launch_options(launch)


def embedding_constants(
    width: int, noise_size: int, dtype: torch.dtype, arch: str, *, is_given: bool,
    is_backward: bool, has_fast_math: bool, can_round: bool = True, is_small: bool = False,
) -> Constants:  # fmt: skip
    """Of `embed_kernel` or `embed_backward_kernel`; `is_small` for few rows.

    float32 operands are multiplied as three products of tf32 where there is fast mathematics. The
    interpreter multiplies 16-bit operands as bit patterns (`can_round` is False there).
    """
    form = ".backward" * is_backward + ".small" * is_small
    launch = setting("energy_head.embed" + form, arch, width)
    words = -(-noise_size // 4)
    row = _chunks(width, launch.block_features)
    constants = {
        "WIDTH": width,
        "CHUNK": row["CHUNK"],
        "IS_GIVEN": is_given,
        "NOISE_SIZE": noise_size,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_Q": max(16, 1 << (words - 1).bit_length()),
        "NORM_EPS": NORM_EPS,
        "DOT_DTYPE": PRODUCT_DTYPES[dtype] if can_round else tl.float32,
        "PRECISION": "tf32x3" if has_fast_math and dtype == torch.float32 else "ieee",
    }
    return constants, launch_options(launch)


def num_groups(num_rows: int, device: torch.device) -> int:
    """Groups of rows whose sums over rows are kept apart in the backward pass."""
    return max(1, min(num_rows, setting("energy_head.groups", architecture(device), 1).block_rows))


def _norm(tensor: Tensor, *, is_backward: bool) -> Constants:
    return norm_constants(tensor.shape[-1], architecture(tensor.device), is_backward=is_backward)


def _activation(width: int, tensor: Tensor) -> Constants:
    arch = architecture(tensor.device)
    return activation_constants(width, arch, has_fast_math=use_fast_math())


def _embedding(noise: Noise, weight: Tensor, *, is_backward: bool) -> Constants:
    width, noise_size = weight.shape
    return embedding_constants(
        width, noise_size, weight.dtype, architecture(weight.device),
        is_given=noise.given is not None, is_backward=is_backward,
        has_fast_math=use_fast_math(), can_round=not is_interpreted(),
        is_small=not is_backward and fuses_head(noise.num_rows, width),
    )  # fmt: skip


def _tiles(num_rows: int, block_rows: int) -> int:
    return -(-num_rows // block_rows)


def embed(
    noise: Noise, weight: Tensor, bias: Tensor, norm: Pair, next_norm: Pair
) -> tuple[Tensor, Tensor]:
    """Residual stream ``[N R, C]`` in float32 and its LayerNorm in the dtype of the weight."""
    shape = (noise.num_rows, weight.shape[0])
    stream = weight.new_empty(shape, dtype=torch.float32)
    normed = weight.new_empty(shape)
    constants, options = _embedding(noise, weight, is_backward=False)
    num_chunks = -(-len(weight) // constants["CHUNK"])
    pointers, strides = noise.arguments()
    embed_kernel[(_tiles(noise.num_rows, constants["BLOCK_ROWS"]),)](
        *pointers, weight, bias, *norm, *next_norm, stream, normed, noise.num_rows,
        max(1, noise.num_draws), num_chunks, *strides, noise.scale, **constants, **options,
    )  # fmt: skip
    return stream, normed


def embed_backward(
    noise: Noise, weight: Tensor, bias: Tensor, norm_weight: Tensor, dstream: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the product ``[N R, C]``, and the noise ``[N R, Z]``; two `sums`."""
    sums.zero_()  # the kernel adds to them
    dproduct = weight.new_empty(dstream.shape)
    drawn = weight.new_empty(noise.num_rows, weight.shape[1])
    constants, options = _embedding(noise, weight, is_backward=True)
    num_chunks = -(-len(weight) // constants["CHUNK"])
    pointers, strides = noise.arguments()
    embed_backward_kernel[(len(sums),)](
        *pointers, weight, bias, norm_weight, dstream, dproduct, drawn, sums, noise.num_rows,
        max(1, noise.num_draws), len(sums), num_chunks, *strides, sums.stride(0), noise.scale,
        **constants, **options,
    )  # fmt: skip
    return dproduct, drawn


def norm(
    step: Tensor | None, bias: Tensor | None, stream: Tensor | None, norm: Pair,
    *, out: Tensor | None = None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """LN(stream + step + bias), of those that are there; the sum goes to `out`."""
    source = stream if step is None else step
    assert source is not None
    normed = torch.empty_like(source, dtype=dtype)
    constants, options = _norm(source, is_backward=False)
    norm_kernel[(_tiles(len(source), constants["BLOCK_ROWS"]),)](
        source, norm.bias if bias is None else bias, source if stream is None else stream,
        source if out is None else out, *norm, normed, len(source), HAS_STEP=step is not None,
        HAS_STREAM=stream is not None, **constants, **options,
    )  # fmt: skip
    return normed


def norm_backward(
    dnormed: Tensor, source: Tensor, bias: Tensor | None, norm: Pair, sums: Tensor,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the source, in place of `dnormed`, and its LayerNorm again; three `sums`.

    The source is a product with a bias, or a float32 stream without one; `upstream` is added.
    """
    normed = torch.empty_like(dnormed)
    constants, options = _norm(source, is_backward=True)
    norm_backward_kernel[(len(sums),)](
        source, norm.bias if bias is None else bias, source, *norm, dnormed,
        dnormed if upstream is None else upstream, dnormed, normed, sums, len(source), len(sums),
        sums.stride(0), HAS_STREAM=bias is None, HAS_UPSTREAM=upstream is not None, **constants,
        **options,
    )  # fmt: skip
    return dnormed, normed


def silu(product: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
    """SiLU(product + bias + context), the context ``[R, C]`` for N rows each."""
    num_rows, width = product.shape
    out = torch.empty_like(product)
    constants, options = _activation(width, product)
    grid = (_tiles(num_rows, constants["BLOCK_ROWS"]), -(-width // constants["BLOCK_COLUMNS"]))
    silu_kernel[grid](
        product, bias, product if context is None else context, out, num_rows,
        max(1, _draws(product, context)), 0 if context is None else context.stride(0),
        HAS_CONTEXT=context is not None, **constants, **options,
    )  # fmt: skip
    return out


def silu_backward(
    dout: Tensor, product: Tensor, bias: Tensor, sums: Tensor, context: Tensor | None = None,
    dcontext: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the product, in place of `dout`, and the activation again; one of the `sums`.

    The context's gradient goes to `dcontext`, which has its strides.
    """
    width, out = product.shape[1], torch.empty_like(product)
    constants, options = _activation(width, product)
    silu_backward_kernel[(len(sums), -(-width // constants["BLOCK_COLUMNS"]))](
        product, bias, product if context is None else context, dout, out, dout,
        product if dcontext is None else dcontext, sums,
        len(product if context is None else context), _draws(product, context), len(sums),
        0 if context is None else context.stride(0), sums.stride(0),
        HAS_CONTEXT=context is not None, **constants, **options,
    )  # fmt: skip
    return dout, out


def _draws(product: Tensor, context: Tensor | None) -> int:
    """Rows of the product for each row of the context."""
    return 1 if context is None else len(product) // max(1, len(context))


def swiglu(product: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) · up of ``[gate; up] = product + bias``, ``[rows, C]``."""
    num_rows, width = product.shape[0], product.shape[1] // 2
    out = product.new_empty(num_rows, width)
    constants, options = _activation(width, product)
    grid = (_tiles(num_rows, constants["BLOCK_ROWS"]), -(-width // constants["BLOCK_COLUMNS"]))
    swiglu_kernel[grid](product, bias, out, num_rows, **constants, **options)
    return out


def swiglu_backward(
    dout: Tensor, product: Tensor, bias: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the product ``[rows, 2C]``, and the activation again; two `sums`."""
    width = product.shape[1] // 2
    out, dproduct = torch.empty_like(dout), torch.empty_like(product)
    constants, options = _activation(width, product)
    swiglu_backward_kernel[(len(sums), -(-width // constants["BLOCK_COLUMNS"]))](
        product, bias, dout, out, dproduct, sums, len(product), len(sums), sums.stride(0),
        **constants, **options,
    )  # fmt: skip
    return dproduct, out
