"""Device functions shared by the kernels: fast or portable mathematics, powers of distances.

`FAST` selects single special-function instructions by inline assembly (NVIDIA, error about 1e-6).
Without it the same quantities come from portable code: AMD, and Triton's interpreter, which has no
inline assembly.
"""

import triton
import triton.language as tl

__all__ = [
    "LANE_AXIS",
    "exp2",
    "log2",
    "power_terms",
    "reciprocal",
    "sigmoid",
    "silu",
    "square_root",
    "sum_features",
    "sum_log2_features",
]

# The feature axis of a tile of samples that lies across lanes. Of axes with the same stride in
# memory, a coalesced load gives lanes to the last one; Triton 3.6 gives them to the first.
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
LANE_AXIS = tl.constexpr(0 if _VERSION < (3, 7) else 2)
# Squared distances at or below the smallest normal float32 count as zero.
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2(x), x > 0."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def reciprocal(x):
    """1 / x, x > 0, from the reciprocal square root: one instruction everywhere, while a division
    is several.
    """
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + e^-x)."""
    return reciprocal(1.0 + exp2(x * _MINUS_LOG2_E, FAST))


@triton.jit
def silu(x, FAST: tl.constexpr):
    """x / (1 + e^-x)."""
    return x * sigmoid(x, FAST)


@triton.jit
def square_root(x, FAST: tl.constexpr):
    """√x, x > 0."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.sqrt(x)
    return result


@triton.jit
def power_terms(square, EXPONENT: tl.constexpr, FAST: tl.constexpr):
    """|v|^α and α|v|^(α-2) from |v|²; both are 0 where v is 0, and NaN where |v|² is NaN."""
    is_zero = square <= _SMALLEST
    safe = tl.where(is_zero, 1.0, square)
    if EXPONENT == 1.0:
        slope = tl.rsqrt(safe)
        value = safe * slope
    else:
        logarithm = log2(safe, FAST)
        value = exp2(EXPONENT / 2 * logarithm, FAST)
        slope = EXPONENT * exp2((EXPONENT / 2 - 1) * logarithm, FAST)
    return tl.where(is_zero, 0.0, value), tl.where(is_zero, 0.0, slope)


@triton.jit
def sum_features(tile):
    """Sum over the features of ``[OUTER, BLOCK_N, LANES, INNER]``: registers first, lanes last."""
    if LANE_AXIS == 0:
        total = tl.sum(tl.sum(tl.sum(tile, axis=2), axis=2), axis=0)
    else:
        total = tl.sum(tl.sum(tl.sum(tile, axis=0), axis=2), axis=1)
    return total


@triton.jit
def _multiply(left, right):
    return left * right


@triton.jit
def sum_log2_features(tile, FAST: tl.constexpr):
    """Σ log2 over the features: one logarithm a lane, of its product, which must stay in range."""
    if LANE_AXIS == 0:
        product = tl.reduce(tl.reduce(tile, 2, _multiply), 2, _multiply)
        total = tl.sum(log2(product, FAST), axis=0)
    else:
        product = tl.reduce(tl.reduce(tile, 0, _multiply), 2, _multiply)
        total = tl.sum(log2(product, FAST), axis=1)
    return total
