"""Nodes of the kernels' quadrature: trapezoid rule in u with tS = exp(u - e^-u), for E|v|^α at any
exponent.

    1/Γ(1-p) ∫ t^-p f(t) dt ≈ Σ_k δ/Γ(1-p) · τ_k^(1-p) (1 + e^-u_k) S^(p-1) f(τ_k / S),    u_k =
    first + kδ

The left end is where τ^(1-p) has fallen to e^-16. The right end grows as the latent size falls: the
transform of few dimensions has an algebraic tail. The error stays below 1e-5 up to α = 1.9, below
1e-6 at α = 1 and L >= 64.
"""

import math
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Nodes", "nodes"]

_LEFT_TAIL = 16.0
# From this exponent on τ^(1-p) falls so slowly that it takes half as many nodes again.
_SLOW_EXPONENT = 1.5
# Least latent size, number of nodes, right end.
_RULES = ((64, 16, 5.0), (8, 24, 10.0), (1, 48, 16.0))


class Nodes(NamedTuple):
    """An equally spaced rule in u, and ln(δ / Γ(1-p)) that all its weights share."""

    num_nodes: int
    first: float
    step: float
    log_scale: float


@lru_cache(maxsize=64)
def nodes(exponent: float, width: int) -> Nodes:
    """The rule for |v|^exponent in `width` dimensions."""
    order = exponent / 2
    count, last = next(rule[1:] for rule in _RULES if width >= rule[0])
    tail = _LEFT_TAIL
    if exponent > _SLOW_EXPONENT:
        count, tail = count * 3 // 2, tail + 4
    low, high = -16.0, 0.0
    for _ in range(60):  # (1-p)(e^-u - u) falls as u grows
        middle = (low + high) / 2
        is_past = (1 - order) * (math.exp(-middle) - middle) > tail
        low, high = (middle, high) if is_past else (low, middle)
    step = (last - low) / (count - 1)
    return Nodes(count, low, step, math.log(step) - math.lgamma(1 - order))
