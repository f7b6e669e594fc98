"""The random numbers of noise.py inside a kernel: the same Philox bits, the same places.

Floats agree to a few 1e-6 in the portable path; in the `FAST` path (NVIDIA) logarithm, sine and
cosine are the approximate instructions, whose error is far below the 20 + 12 bits that a normal is
made of.
"""

import triton
import triton.language as tl

from calm_kernels.device import log2, square_root

__all__ = ["load_key", "normal_at", "normal_pair", "normal_slices", "philox", "uniform_at"]

_MINUS_2_LN_2 = tl.constexpr(-1.3862943611198906)
_ANGLE_STEP = tl.constexpr(1.5339807878856412e-3)  # 2π / 2^12
_PI = tl.constexpr(3.141592653589793)
_RADIUS_STEP = tl.constexpr(2.0**-20)
_UNIFORM_STEP = tl.constexpr(2.0**-24)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10: four uint32 words; a 32 x 32 bit product is one 64-bit multiplication."""
    for step in tl.static_range(10):
        if step > 0:
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def load_key(seed_ptr, first_row, row, stride_seed, STREAM: tl.constexpr):
    """Key words and the three counter words of a row: k0, k1, c1, c2, c3.

    Without a seed of its own (`stride_seed` 0) row r is row ``first_row + r`` of the shared stream.
    The first row is a number, or a pointer to it.
    """
    seed = tl.load(seed_ptr + row * stride_seed)
    offset = tl.load(seed_ptr + row * stride_seed + 1)
    if first_row.dtype.is_ptr():
        first_row = tl.load(first_row)
    counter = first_row + tl.where(stride_seed == 0, row, 0)
    k1 = (seed >> 32).to(tl.uint32) ^ STREAM
    c2, c3 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    return seed.to(tl.uint32), k1, counter.to(tl.uint32), c2, c3


@triton.jit
def _polynomial_sin_cos(step):
    """sin and cos of (step + 1/2) 2π / 2^12 - π, to 1e-7: a quarter turn, then polynomials."""
    angle = ((step & 1023).to(tl.float32) + 0.5) * _ANGLE_STEP - _PI / 4  # in (-π/4, π/4)
    square = angle * angle
    sine = 1 / 120 + square * (-1 / 5040 + square * (1 / 362880))
    sine = angle * (1 + square * (-1 / 6 + square * sine))
    cosine = 1 / 24 + square * (-1 / 720 + square * (1 / 40320))
    cosine = 1 + square * (-1 / 2 + square * cosine)
    # The whole angle is that plus quarter · π/2 + π/4 - π: rotate by -3π/4, then by quarters.
    root_half: tl.constexpr = 0.7071067811865476
    base_sine = (-sine - cosine) * root_half
    base_cosine = (sine - cosine) * root_half
    quarter = step >> 10
    is_odd = (quarter & 1) != 0
    turned_sine = tl.where(is_odd, base_cosine, base_sine)
    turned_cosine = tl.where(is_odd, -base_sine, base_cosine)
    sign = tl.where((quarter & 2) != 0, -1.0, 1.0)
    return sign * turned_sine, sign * turned_cosine


@triton.jit
def normal_pair(word, FAST: tl.constexpr):
    """Two normals of one word by Box-Muller: radius times cosine, radius times sine."""
    fraction = (word >> 12).to(tl.float32) * _RADIUS_STEP + _RADIUS_STEP / 2
    radius = square_root(log2(fraction, FAST) * _MINUS_2_LN_2, FAST)
    step = (word & 4095).to(tl.int32)
    if FAST:
        angle = step.to(tl.float32) * _ANGLE_STEP + (_ANGLE_STEP / 2 - _PI)
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        sine, cosine = _polynomial_sin_cos(step)
    return radius * cosine, radius * sine


@triton.jit
def normal_slices(c0, c1, c2, c3, k0, k1, FAST: tl.constexpr):
    """The eight normals of one Philox call, in the order of noise.py's slices."""
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    e0, e1 = normal_pair(w0, FAST)
    e2, e3 = normal_pair(w1, FAST)
    e4, e5 = normal_pair(w2, FAST)
    e6, e7 = normal_pair(w3, FAST)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _pick(w0, w1, w2, w3, index):
    return tl.where(index < 2, tl.where(index == 0, w0, w1), tl.where(index == 2, w2, w3))


@triton.jit
def normal_at(draw, element, k0, k1, c1, c2, c3, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Normal `element` of draw `draw` of a row, each lane for itself; WORDS = ceil(width / 8)."""
    c0 = (draw * WORDS + element % WORDS).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox(c0, c1 + zero, c2 + zero, c3 + zero, k0, k1)
    output = element // WORDS
    cosine, sine = normal_pair(_pick(w0, w1, w2, w3, output // 2), FAST)
    return tl.where(output % 2 == 0, cosine, sine)


@triton.jit
def uniform_at(draw, element, k0, k1, c1, c2, c3, WORDS: tl.constexpr):
    """Uniform `element` of draw `draw` of a row, each lane for itself; WORDS = ceil(width / 4)."""
    c0 = (draw * WORDS + element % WORDS).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox(c0, c1 + zero, c2 + zero, c3 + zero, k0, k1)
    return (_pick(w0, w1, w2, w3, element // WORDS) >> 8).to(tl.float32) * _UNIFORM_STEP
