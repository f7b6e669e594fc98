"""Draws of a chunk whose first tokens are given, by rejection.

A draw of the head is accepted if it begins with the given tokens. Accepted draws follow the model's
own distribution given these tokens. Draws come in waves, so that the search ends soon after enough
of them were accepted.

Shapes: B sequences, N draws, L latent size, K tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calm.decoding.sampling.chunk_distribution import ChunkDistribution
from calm.decoding.sampling.lazy_decode import decode_matching
from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance

__all__ = ["CollectedDraws", "Prefix", "collect_accepted", "draw_accepted", "waves"]


class Prefix(NamedTuple):
    """The first tokens of the next chunk, which are given.

    Attributes:
        tokens: ``[B, K]``. Those after the given ones are used where no draw is accepted.
        length: how many are given, ``[B]``, 0 to K.
    """

    tokens: Tensor
    length: Tensor

    def select(self, rows: Tensor) -> "Prefix":
        """The prefixes of the sequences `rows`."""
        return Prefix(self.tokens[rows], self.length[rows])


class AcceptedDraws(NamedTuple):
    """Accepted draws of one wave, in the order drawn.

    Attributes:
        latents: ``[M, B, L]``, M the largest of the counts; after a sequence's own, any numbers.
        counts: how many, ``[B]``.
        place: of each among all draws of the wave, ``[B, M]``.
        is_finite: whether all draws were finite, ``[B]``.
    """

    latents: Tensor
    counts: Tensor
    place: Tensor
    is_finite: Tensor


class CollectedDraws(NamedTuple):
    """Accepted draws of all waves, up to the number needed.

    Attributes:
        latents: ``[needed, B, L]``, in the order drawn; zeros after the last.
        counts: how many, ``[B]``.
        draws: head draws up to the last that was kept, or all of them where fewer than needed were
            accepted, ``[B]``.
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

    Waves double from `first` draws to `size`, so that a search that ends soon costs little.
    """
    wave, before, most = 0, 0, first
    while before < max_draws:
        draws = min(size, most, max_draws - before)
        yield advance(seed, wave * OFFSET_STRIDE), before, draws
        wave, before, most = wave + 1, before + draws, min(2 * most, size)


def draw_accepted(
    distribution: ChunkDistribution,
    prefix: Prefix | None,
    num_samples: int,
    seed: Tensor,
    noise_scale: float,
    noise_spread: float = 1.0,
) -> AcceptedDraws:
    """The draws of one wave that begin with the given tokens; all of them without a prefix."""
    latents = distribution.latents(
        num_samples, seed, noise_scale=noise_scale, noise_spread=noise_spread
    )  # [N, B, L]
    is_finite = torch.isfinite(latents).all(-1).all(0)
    if prefix is None:
        place = torch.arange(num_samples, device=distribution.device).expand(len(distribution), -1)
        count = place.new_full((len(distribution),), num_samples)
        return AcceptedDraws(latents, count, place, is_finite)
    fits = decode_matching(
        distribution.slots(latents), distribution.project, prefix.tokens, prefix.length
    )
    count = fits.sum(0)
    place = (~fits).to(torch.uint8).argsort(dim=0, stable=True)[: int(count.max())]
    latents = latents.gather(0, place[..., None].expand(-1, -1, latents.shape[-1]))
    return AcceptedDraws(latents, count, place.T, is_finite)


def collect_accepted(
    distribution: ChunkDistribution,
    prefix: Prefix,
    *,
    needed: int,
    wave_size: int,
    max_draws: int,
    seed: Tensor,
    noise_scale: float,
    noise_spread: float = 1.0,
) -> CollectedDraws:
    """Draw in waves until each sequence has `needed` accepted draws, or `max_draws` were made.

    Args:
        distribution: of the chunk without the given tokens.
        prefix: the given tokens.
        needed: draws to keep for each sequence.
        wave_size: draws of a accepted.
        max_draws: draws of a sequence at most.
        seed: int64 ``[B, 2]``.
        noise_scale: factor on the head's noise.
        noise_spread: factor on what that contributes, see `GenerativeHead.sample`.
    """
    rows = torch.arange(len(distribution), device=distribution.device)
    count, draws = torch.zeros_like(rows), torch.zeros_like(rows)
    is_finite = torch.ones_like(rows, dtype=torch.bool)
    kept: Tensor | None = None
    for wave_seed, before, size in waves(seed, wave_size, max_draws, first=wave_size):
        accepted = draw_accepted(
            distribution.select(rows),
            prefix.select(rows),
            size,
            wave_seed[rows],
            noise_scale,
            noise_spread,
        )
        if kept is None:
            kept = accepted.latents.new_zeros(needed, len(distribution), accepted.latents.shape[-1])
        order = torch.arange(accepted.place.shape[1], device=distribution.device)
        target = count[rows, None] + order  # [b, M]
        row, column = ((order < accepted.counts[:, None]) & (target < needed)).nonzero(
            as_tuple=True
        )
        kept[target[row, column], rows[row]] = accepted.latents[column, row]
        last = (target == needed - 1) & (order < accepted.counts[:, None])
        spent = torch.where(last, before + accepted.place + 1, 0).sum(1)
        draws[rows] = torch.where(last.any(1), spent, before + size)
        count[rows] = (count[rows] + accepted.counts).clamp(max=needed)
        is_finite[rows] &= accepted.is_finite
        rows = rows[count[rows] < needed]
        if not len(rows):
            break
    assert kept is not None  # max_draws >= 1
    return CollectedDraws(kept, count, draws, is_finite)
