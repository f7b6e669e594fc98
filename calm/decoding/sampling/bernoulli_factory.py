"""Algorithm 1 over a block of draws in order: all rounds of all sequences at once.

With 1/T = n + a, a round takes n draws and fails unless they all are one patch. If a > 0 a
Bernoulli factory follows: draws until one is that patch, where the i-th that is not ends the round
with probability a/i. The next round begins at the next draw. Rounds stop at their first mismatch
here, which leaves more draws to the rounds after them and changes no law.

Where a round beginning at a draw would end is computed for every draw of the block, from the
lengths of runs of equal draws and from the next draw that equals a given one. The rounds that take
place are a path through these ends; pointer doubling finds its end in log2(W) steps. The draw at
which a factory gives up unless a match comes first, i with P(i > k) = Π_{j<=k} (1 - a/j), comes
from one uniform a round. An unfinished round is carried into the next block.

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
    """What a block brought, each ``[B]``.

    Attributes:
        is_accepted: whether a round succeeded.
        first: first draw of the round that succeeded, or else of the unfinished one; 0 stands for
            the round carried in, i + 1 for draw i of the block.
        used: draws of the block up to the end of the round that succeeded.
        saved: draws that failed rounds did without by stopping at their first mismatch.
        run: equal draws of the unfinished round, 0 .. n; n where its factory runs.
        factory_left: draws of the unfinished round's factory until it gives up.
    """

    is_accepted: Tensor
    first: Tensor
    used: Tensor
    saved: Tensor
    run: Tensor
    factory_left: Tensor


def factory_stopping_draw(uniforms: Tensor, fraction: float, limit: int) -> Tensor:
    """Draw of the factory that ends a round, in 1 .. limit + 1, by inversion of its law.

    Args:
        uniforms: float64, in [0, 1).
        fraction: a, in (0, 1).
        limit: later draws are not told apart.
    """
    known = min(limit, TABLE_SIZE)
    index = torch.arange(1, known + 1, dtype=torch.float64, device=uniforms.device)
    survival = torch.cumprod(1.0 - fraction / index, dim=0)  # falls with the index
    ends = torch.searchsorted(-survival, -uniforms) + 1
    if known == limit:
        return ends
    # Beyond the table P(i > k) falls as (k + (1 - a) / 2)^-a, to 1 / (60 TABLE_SIZE^2) relative.
    middle = (1.0 - fraction) / 2
    later = (known + middle) * (survival[-1] / uniforms).pow(1.0 / fraction) - middle
    later = later.ceil().clamp(known + 1, limit + 1).to(torch.int64)
    return torch.where(ends > known, later, ends)


def run_rounds(
    draws: Tensor, length: Tensor, power: Power, *, run: Tensor, stopping: Tensor | None
) -> Outcome:
    """Play rounds until one succeeds or the block is used up.

    Args:
        draws: int64 ``[B, 1 + W]``, equal numbers for equal patches of a row: first that of the
            round carried in (anything if there is none), then the block.
        length: draws of the block that count, ``[B]``; they come first.
        power: n and a.
        run: equal draws of the round carried in, ``[B]``; 0 for none.
        stopping: `factory_stopping_draw` of the round that begins at each draw, int64
            ``[B, n + W]``; the first n for a round carried in: what is left of it where its run is
            n. None for a = 0.

    Cost: O(B W log W) time.
    """
    n = power.whole
    # A round carried in is replayed from copies of its patch, of which there are 1 <= run <= n.
    patches = torch.cat([draws[:, :1].expand(-1, n), draws[:, 1:]], dim=1)
    size, end = patches.shape[1], (n + length)[:, None]
    place = torch.arange(size, device=draws.device)
    run_end = _run_ends(patches, end)
    equal = run_end - place
    fails = (equal < n) & (run_end < end)
    ends = run_end + 1  # where the next round begins
    saved = torch.where(fails, n - 1 - equal, 0)
    accepts, stop = equal >= n, (place + n).expand_as(equal)
    if stopping is not None:
        match = _next_equal(patches).gather(1, (stop - 1).clamp(max=size - 1))
        match = torch.where(match < end, match, size)
        last = stop + stopping - 1  # the factory gives up if this draw is a mismatch
        gives_up = accepts & (last < match) & (last < end)
        fails, ends = fails | gives_up, torch.where(gives_up, last + 1, ends)
        accepts, stop = accepts & (match <= last) & (match < size), match + 1
    begin, total = _follow(n - run, torch.where(fails, ends, place), saved)
    at = begin.clamp(max=size - 1)[:, None]
    beyond = end[:, 0] - begin  # draws since the unfinished round began
    left = torch.zeros_like(run)
    if stopping is not None:
        left = stopping.gather(1, at)[:, 0] - (beyond - n).clamp(min=0)
    return Outcome(
        is_accepted=accepts.gather(1, at)[:, 0] & (begin < size),
        first=(begin - n + 1).clamp(min=0, max=draws.shape[1] - 1),
        used=stop.gather(1, at)[:, 0] - n,
        saved=total,
        run=beyond.clamp(max=n),
        factory_left=left,
    )


def _run_ends(patches: Tensor, end: Tensor) -> Tensor:
    """For each draw the first one behind it that differs, or `end`, ``[B, n + W]``."""
    size = patches.shape[1]
    place = torch.arange(size, device=patches.device)
    differs = torch.ones_like(patches, dtype=torch.bool)
    differs[:, :-1] = patches[:, 1:] != patches[:, :-1]
    ends = torch.where(differs, place + 1, size).flip(1).cummin(1).values.flip(1)
    return torch.minimum(ends, end)


def _next_equal(patches: Tensor) -> Tensor:
    """For each draw the next one equal to it, or n + W, ``[B, n + W]``."""
    size = patches.shape[1]
    ordered, order = patches.sort(dim=1, stable=True)
    is_equal = ordered[:, 1:] == ordered[:, :-1]
    following = torch.full_like(order, size)
    following[:, :-1] = torch.where(is_equal, order[:, 1:], size)
    return torch.empty_like(order).scatter_(1, order, following)


def _follow(start: Tensor, pointers: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Where the path from `start` ``[B]`` ends, and what its steps cost.

    A place that points at itself ends the path, and costs 0; so does the place behind all.
    """
    batch, size = pointers.shape
    pointers = torch.cat([pointers, pointers.new_full((batch, 1), size)], dim=1)
    cost = torch.cat([cost, cost.new_zeros(batch, 1)], dim=1)
    for _ in range(math.ceil(math.log2(size + 1))):
        cost = cost + cost.gather(1, pointers)
        pointers = pointers.gather(1, pointers)
    return pointers.gather(1, start[:, None])[:, 0], cost.gather(1, start[:, None])[:, 0]
