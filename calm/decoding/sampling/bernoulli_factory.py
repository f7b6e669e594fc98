"""Algorithm 1 over a block of draws in order: all rounds of all sequences at once.

With 1/T = n + a, a round takes n draws and fails unless all of them are the same chunk. If a > 0, a
Bernoulli factory follows: it draws until a draw equals that chunk, and the i-th draw that differs
ends the round with probability a/i. The next round begins at the next draw. Here a round stops at
its first mismatch. That gives later rounds more draws and does not change the distribution.

There is no loop over draws. For every draw of the block, the end of a round that would begin there
follows from the lengths of runs of equal draws and from the next draw that equals a given one. The
rounds that take place are a path through these ends; pointer doubling finds its end in log2(W)
steps. One uniform number per round decides at which draw its factory gives up unless a match comes
first: at draw i, with P(i > k) = Π_{j<=k} (1 - a/j). An unfinished round is carried into the next
block.

Shapes: B sequences, W draws of a block.

Source: CALM, Algorithm 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calm.decoding.sampling.voting import Power

__all__ = ["Outcome", "factory_stopping_draw", "run_rounds"]

TABLE_SIZE = 2**14  # of `factory_stopping_draw`


class Outcome(NamedTuple):
    """The result of a block, each ``[B]``.

    Attributes:
        is_accepted: whether a round succeeded.
        first: first draw of the round that succeeded, or else of the unfinished one; 0 stands for
            the round carried in, i + 1 for draw i of the block.
        used: draws of the block up to the end of the round that succeeded.
        saved: draws that failed rounds skipped by stopping at their first mismatch.
        num_equal: equal draws of the unfinished round, 0 .. n; at n its factory runs.
        factory_left: draws until the factory of the unfinished round gives up.
    """

    is_accepted: Tensor
    first: Tensor
    used: Tensor
    saved: Tensor
    num_equal: Tensor
    factory_left: Tensor


def factory_stopping_draw(uniforms: Tensor, fraction: float, limit: int) -> Tensor:
    """The draw at which the Bernoulli factory of a round gives up, if no match came before.

    P(draw > k) = Π_{j<=k} (1 - a/j), by inversion.

    Args:
        uniforms: float64, in [0, 1).
        fraction: a, in (0, 1).
        limit: all draws after this one give limit + 1.

    Returns: int64 in 1 .. limit + 1, one for each uniform.
    """
    size = min(limit, TABLE_SIZE)
    index = torch.arange(1, size + 1, dtype=torch.float64, device=uniforms.device)
    survival = torch.cumprod(1.0 - fraction / index, dim=0)  # falls with the index
    ends = torch.searchsorted(-survival, -uniforms) + 1
    if size == limit:
        return ends
    # After the table P(i > k) falls as (k + (1 - a) / 2)^-a, to 1 / (60 TABLE_SIZE^2) relative.
    middle = (1.0 - fraction) / 2
    later = (size + middle) * (survival[-1] / uniforms).pow(1.0 / fraction) - middle
    later = later.ceil().clamp(size + 1, limit + 1).to(torch.int64)
    return torch.where(ends > size, later, ends)


def run_rounds(
    draws: Tensor,
    length: Tensor,
    power: Power,
    *,
    num_equal: Tensor,
    stopping_draw: Tensor | None,
) -> Outcome:
    """Run rounds until one succeeds or the block ends.

    Args:
        draws: int64 ``[B, 1 + W]``, equal numbers for equal chunks of a sequence: first the chunk
            of the round carried in (any number if there is none), then the block.
        length: draws of the block that count, ``[B]``; they come first.
        power: n and a.
        num_equal: equal draws of the round carried in, ``[B]``; 0 for none.
        stopping_draw: `factory_stopping_draw` of the round that would begin at each draw, int64
            ``[B, n + W]``. The first n are for a round carried in: where its `num_equal` is n, the
            first of them counts the draws that are left. None for a = 0.

    Cost: O(B W log W) time.
    """
    n = power.whole
    # A round carried in is repeated from `num_equal` copies of its chunk, at most n.
    chunks = torch.cat([draws[:, :1].expand(-1, n), draws[:, 1:]], dim=1)
    size, end = chunks.shape[1], (n + length)[:, None]
    place = torch.arange(size, device=draws.device)
    run_end = _run_ends(chunks, end)
    equal = run_end - place
    fails = (equal < n) & (run_end < end)
    ends = run_end + 1  # where the next round begins
    saved = torch.where(fails, n - 1 - equal, 0)
    accepts, stop = equal >= n, (place + n).expand_as(equal)
    if stopping_draw is not None:
        match = _next_equal(chunks).gather(1, (stop - 1).clamp(max=size - 1))
        match = torch.where(match < end, match, size)
        last = stop + stopping_draw - 1  # the factory gives up if this draw is a mismatch
        gives_up = accepts & (last < match) & (last < end)
        fails, ends = fails | gives_up, torch.where(gives_up, last + 1, ends)
        accepts, stop = accepts & (match <= last) & (match < size), match + 1
    begin, total = _follow(n - num_equal, torch.where(fails, ends, place), saved)
    at = begin.clamp(max=size - 1)[:, None]
    since_begin = end[:, 0] - begin  # draws since the unfinished round began
    factory_left = torch.zeros_like(num_equal)
    if stopping_draw is not None:
        factory_left = stopping_draw.gather(1, at)[:, 0] - (since_begin - n).clamp(min=0)
    return Outcome(
        is_accepted=accepts.gather(1, at)[:, 0] & (begin < size),
        first=(begin - n + 1).clamp(min=0, max=draws.shape[1] - 1),
        used=stop.gather(1, at)[:, 0] - n,
        saved=total,
        num_equal=since_begin.clamp(max=n),
        factory_left=factory_left,
    )


def _run_ends(chunks: Tensor, end: Tensor) -> Tensor:
    """For each draw the first later one that differs from it, or `end`, ``[B, n + W]``."""
    size = chunks.shape[1]
    place = torch.arange(size, device=chunks.device)
    differs = torch.ones_like(chunks, dtype=torch.bool)
    differs[:, :-1] = chunks[:, 1:] != chunks[:, :-1]
    ends = torch.where(differs, place + 1, size).flip(1).cummin(1).values.flip(1)
    return torch.minimum(ends, end)


def _next_equal(chunks: Tensor) -> Tensor:
    """For each draw the next one that equals it, or n + W, ``[B, n + W]``."""
    size = chunks.shape[1]
    ordered, order = chunks.sort(dim=1, stable=True)
    is_equal = ordered[:, 1:] == ordered[:, :-1]
    following = torch.full_like(order, size)
    following[:, :-1] = torch.where(is_equal, order[:, 1:], size)
    return torch.empty_like(order).scatter_(1, order, following)


def _follow(start: Tensor, pointers: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Where the path from `start` ``[B]`` ends, and the sum of the costs on the way.

    A place that points at itself ends the path and costs 0. The place after the last one does too.
    """
    batch, size = pointers.shape
    pointers = torch.cat([pointers, pointers.new_full((batch, 1), size)], dim=1)
    cost = torch.cat([cost, cost.new_zeros(batch, 1)], dim=1)
    for _ in range(math.ceil(math.log2(size + 1))):
        cost = cost + cost.gather(1, pointers)
        pointers = pointers.gather(1, pointers)
    return pointers.gather(1, start[:, None])[:, 0], cost.gather(1, start[:, None])[:, 0]
