"""Draws of a chunk whose first tokens are known, by rejection: the model's own law given them.

Shapes: B sequences, N draws, L latent size, K tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calm.decoding.sampling.chunk_distribution import ChunkDistribution
from calm.decoding.sampling.lazy_decode import decode_matching
from calm.decoding.sampling.seeds import ROUND_STRIDE, advance

__all__ = ["CollectedDraws", "Prefix", "collect_accepted", "draw_accepted", "waves"]


class Prefix(NamedTuple):
    """First tokens of the next chunk that are known.

    Attributes:
        tokens: ``[B, K]``; what follows the known ones is used where no draw fits.
        length: how many are known, ``[B]``, 0 to K.
    """

    tokens: Tensor
    length: Tensor

    def select(self, rows: Tensor) -> "Prefix":
        """Those of the sequences `rows`."""
        return Prefix(self.tokens[rows], self.length[rows])


class AcceptedDraws(NamedTuple):
    """Draws of one wave that fit, in their order.

    Attributes:
        latents: ``[M, B, L]``, M the largest number of them in a row; then anything.
        counts: how many, ``[B]``.
        place: of each among all draws of the wave, ``[B, M]``.
        is_finite: whether all draws were finite, ``[B]``.
    """

    latents: Tensor
    counts: Tensor
    place: Tensor
    is_finite: Tensor


class CollectedDraws(NamedTuple):
    """Draws kept for each row.

    Attributes:
        latents: ``[needed, B, L]``, in the order drawn; zeros behind the last.
        counts: how many, ``[B]``.
        draws: head draws up to the last that was kept, or all where fewer than needed fit, ``[B]``.
        is_finite: whether all draws were finite, ``[B]``.
    """

    latents: Tensor
    counts: Tensor
    draws: Tensor
    is_finite: Tensor


def waves(
    seed: Tensor, size: int, max_draws: int, *, first: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Seed of each wave, draws before it and draws in it, until `max_draws` are made.

    Waves grow twofold from `first` draws to `size`, so that what is found soon costs little.
    """
    wave, before, most = 0, 0, first
    while before < max_draws:
        draws = min(size, most, max_draws - before)
        yield advance(seed, wave * ROUND_STRIDE), before, draws
        wave, before, most = wave + 1, before + draws, min(2 * most, size)


def draw_accepted(
    source: ChunkDistribution,
    known: Prefix | None,
    num_samples: int,
    seed: Tensor,
    noise_scale: float,
    noise_spread: float = 1.0,
) -> AcceptedDraws:
    """One wave of draws; those that begin with what is known."""
    latents = source.latents(
        num_samples, seed, noise_scale=noise_scale, noise_spread=noise_spread
    )  # [N, B, L]
    is_finite = torch.isfinite(latents).all(-1).all(0)
    if known is None:
        place = torch.arange(num_samples, device=source.device).expand(len(source), -1)
        count = place.new_full((len(source),), num_samples)
        return AcceptedDraws(latents, count, place, is_finite)
    fits = decode_matching(source.slots(latents), source.project, known.tokens, known.length)
    count = fits.sum(0)
    place = (~fits).to(torch.uint8).argsort(dim=0, stable=True)[: int(count.max())]
    latents = latents.gather(0, place[..., None].expand(-1, -1, latents.shape[-1]))
    return AcceptedDraws(latents, count, place.T, is_finite)


def collect_accepted(
    source: ChunkDistribution,
    known: Prefix,
    *,
    needed: int,
    wave_size: int,
    max_draws: int,
    seed: Tensor,
    noise_scale: float,
    noise_spread: float = 1.0,
) -> CollectedDraws:
    """Draw in waves until each row has `needed` draws that fit, or `max_draws` were made.

    Args:
        source: the law without what is known.
        known: first tokens.
        needed: draws to keep for each row.
        wave_size: draws a wave.
        max_draws: draws a row at most.
        seed: int64 ``[B, 2]``.
        noise_scale: factor on the head's noise.
        noise_spread: factor on what that contributes, see `GenerativeHead.sample`.
    """
    rows = torch.arange(len(source), device=source.device)
    count, draws = torch.zeros_like(rows), torch.zeros_like(rows)
    is_finite = torch.ones_like(rows, dtype=torch.bool)
    kept: Tensor | None = None
    for wave_seed, before, size in waves(seed, wave_size, max_draws, first=wave_size):
        part = draw_accepted(
            source.select(rows),
            known.select(rows),
            size,
            wave_seed[rows],
            noise_scale,
            noise_spread,
        )
        if kept is None:
            kept = part.latents.new_zeros(needed, len(source), part.latents.shape[-1])
        order = torch.arange(part.place.shape[1], device=source.device)
        target = count[rows, None] + order  # [b, M]
        row, column = ((order < part.counts[:, None]) & (target < needed)).nonzero(as_tuple=True)
        kept[target[row, column], rows[row]] = part.latents[column, row]
        last = (target == needed - 1) & (order < part.counts[:, None])
        spent = torch.where(last, before + part.place + 1, 0).sum(1)
        draws[rows] = torch.where(last.any(1), spent, before + size)
        count[rows] = (count[rows] + part.counts).clamp(max=needed)
        is_finite[rows] &= part.is_finite
        rows = rows[count[rows] < needed]
        if not len(rows):
            break
    assert kept is not None  # max_draws >= 1
    return CollectedDraws(kept, count, draws, is_finite)
