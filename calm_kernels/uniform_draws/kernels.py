"""Kernels that write addressed draws: a lane makes one call of Philox, whatever row it is of.

Sizes and stream are no compile-time constants: one compiled kernel serves all draws of a dtype.
Number k of the calls of a row are neighbours in memory, so that lanes write next to each other.
"""

import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.noise_kernels import load_key, normal_slices, philox
from calm_kernels.overlap import overlapped, wait_for_previous
from calm_kernels.tuning import Constants, architecture, launch_options, setting, use_fast_math

__all__ = ["draw_constants", "normal_kernel", "uniform_kernel", "write_draws"]

_UNIFORM_STEP = tl.constexpr(2.0**-24)
_MASK = 2**32 - 1
_SIZES = ["num_calls", "num_draws", "words", "width", "stream", "first", "stride_seed", "row"]


@triton.jit
def _locate(
    seed_ptr, row, num_calls, num_draws, words, width, stream, first, stride_seed,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Key and counter of each call, its place in memory, its word, and whether it is one."""
    call = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_call = call < num_calls
    call = tl.minimum(call, num_calls - 1)
    word = call % words
    own_row = (call // (num_draws * words)).to(tl.int64)
    k0, k1, c1, c2, c3 = load_key(seed_ptr, row, own_row, stride_seed, 0)
    c0 = (call % (num_draws * words)).to(tl.uint32) + first.to(tl.uint32)
    offs = call // words * width + word
    return c0, c1, c2, c3, k0, k1 ^ stream.to(tl.uint32), offs, word, is_call


@triton.jit
def _store(out_ptr, value, offs, word, is_call, k: tl.constexpr, words, width):
    mask = is_call & (word + k * words < width)
    tl.store(out_ptr + offs + k * words, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def uniform_kernel(
    seed_ptr, row, out_ptr, num_calls, num_draws, words, width, stream, first, stride_seed,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = (word >> 8) / 2^24, the four words of each call."""
    wait_for_previous(OVERLAP)
    c0, c1, c2, c3, k0, k1, offs, word, is_call = _locate(
        seed_ptr, row, num_calls, num_draws, words, width, stream, first, stride_seed, BLOCK
    )
    drawn = philox(c0, c1, c2, c3, k0, k1)
    for k in tl.static_range(4):
        value = (drawn[k] >> 8).to(tl.float32) * _UNIFORM_STEP
        _store(out_ptr, value, offs, word, is_call, k, words, width)


@triton.jit(do_not_specialize=_SIZES)
def normal_kernel(
    seed_ptr, row, out_ptr, num_calls, num_draws, words, width, stream, first, stride_seed,
    BLOCK: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = radius · cos(angle) and radius · sin(angle), the eight normals of each call."""
    wait_for_previous(OVERLAP)
    c0, c1, c2, c3, k0, k1, offs, word, is_call = _locate(
        seed_ptr, row, num_calls, num_draws, words, width, stream, first, stride_seed, BLOCK
    )
    drawn = normal_slices(c0, c1, c2, c3, k0, k1, FAST)
    for k in tl.static_range(8):
        _store(out_ptr, drawn[k], offs, word, is_call, k, words, width)


def draw_constants(arch: str, *, is_normal: bool, has_fast_math: bool) -> Constants:
    """Compile-time constants and compiler options of either kernel."""
    chosen = setting("uniform_draws", arch, 1)
    constants = {"BLOCK": chosen.block_rows} | ({"FAST": has_fast_math} if is_normal else {})
    return overlapped(constants, launch_options(chosen), arch)


def write_draws(
    seed: Tensor, first_row: int | Tensor, out: Tensor, first_draw: int, stream: int, *,
    is_normal: bool,
) -> None:  # fmt: skip
    """Launch: fill `out`, ``[R, N, W]``, of any floating dtype."""
    num_rows, num_draws, width = out.shape
    words = -(-width // (8 if is_normal else 4))
    num_calls = num_rows * num_draws * words
    constants, options = draw_constants(
        architecture(seed.device), is_normal=is_normal, has_fast_math=use_fast_math()
    )
    kernel = normal_kernel if is_normal else uniform_kernel
    kernel[(-(-num_calls // constants["BLOCK"]),)](
        seed, first_row, out, num_calls, num_draws, words, width, stream,
        first_draw * words & _MASK, 0 if seed.dim() == 1 else 2, **constants, **options,
    )  # fmt: skip
