"""Algorithm 1: draws in order until 1/T of them agree, exactly P^(1/T) for any temperature.

Draws come in waves: a wave is some head draws for each sequence that has no chunk yet. Where the
first tokens of a chunk are given, only draws that begin with them count; they are accepted.

Shapes: B sequences, b of them still without a chunk, M accepted draws of a wave, L latent size, K
tokens of a chunk, n the whole part of 1/T.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calm.decoding.chunk import Chunk
from calm.decoding.sampling.bernoulli_factory import Outcome, factory_stopping_draw, run_rounds
from calm.decoding.sampling.chunk_distribution import ChunkDistribution
from calm.decoding.sampling.lazy_decode import Candidates
from calm.decoding.sampling.prefix_rejection import AcceptedDraws, Prefix, draw_accepted, waves
from calm.decoding.sampling.voting import split_power, vote_by_count
from calm_kernels import chunk_record, uniform_draws
from calm_kernels.noise import Stream

__all__ = ["Exact"]

FIRST_WAVE = 16  # draws


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Algorithm 1 with its Bernoulli factory, over waves of draws in order.

    With 1/T = n + a and Z = Σ P(x)^(1/T), a chunk takes (n + [a > 0] Σ P(x)^(1/T - 1)) / Z draws on
    average. `Chunk.draws` counts them as the algorithm is written: n for each round. A sequence
    that has its chunk draws no more. A sequence that reaches `max_draws` falls back to Algorithm 2
    over all its draws and is flagged; if it has no accepted draw, the given tokens are its chunk.

    Attributes:
        temperature: T in (0, 1].
        num_samples: draws of a wave at most; the distribution does not depend on it.
        noise_scale: factor on the head's noise.
        max_draws: draws of a chunk at most.

    Source: CALM, Algorithm 1 and Theorem 2.
    """

    temperature: float = 0.5
    num_samples: int = 200
    noise_scale: float = 1.0
    max_draws: int = 5000
    head_temperature: ClassVar[float] = 1.0
    is_capturable: ClassVar[bool] = False
    is_one_draw: ClassVar[bool] = False

    def choose(self, distribution: ChunkDistribution, seed: Tensor) -> Chunk:
        """See `Method`."""
        return self._search(distribution, None, seed)

    def complete(
        self, distribution: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """See `Method`."""
        return self._search(distribution, Prefix(given, given_length), seed)

    def _search(
        self, distribution: ChunkDistribution, prefix: Prefix | None, seed: Tensor
    ) -> Chunk:
        search = _Search(self, distribution, prefix, seed)
        plan = waves(seed, self.num_samples, self.max_draws, first=FIRST_WAVE)
        for wave_seed, before, size in plan:
            search.draw_wave(wave_seed, before, size)
            if not len(search.rows):
                break
        return search.chunk()


class _Search:
    """Algorithm 1 of a batch, wave by wave.

    Attributes:
        rows: sequences without a chunk, ``[b]``. Each may have an unfinished round, which the next
            wave continues; the next three attributes describe it.
        round_latent: a draw of the round, ``[b, L]``; None before the first accepted draw.
        num_equal: equal draws of the round so far, 0 .. n, ``[b]``; at n its factory runs.
        factory_left: draws until the factory of the round gives up, ``[b]``.
        tokens: the chunks found so far, ``[B, K]``.
        draws: head draws made for each sequence, ``[B]``.
        saved: draws that failed rounds skipped by stopping at their first mismatch, ``[B]``.
        num_agreeing: draws that agreed on each chunk, ``[B]``.
        is_finite: whether all draws were finite, ``[B]``.
        history: `rows` and accepted draws of each wave, for the fallback.
    """

    def __init__(
        self, method: Exact, distribution: ChunkDistribution, prefix: Prefix | None, seed: Tensor
    ) -> None:
        self.method, self.distribution, self.prefix, self.seed = method, distribution, prefix, seed
        self.power = split_power(method.temperature)
        self.rows = torch.arange(len(distribution), device=distribution.device)
        self.round_latent: Tensor | None = None
        self.num_equal = torch.zeros_like(self.rows)
        self.factory_left = torch.zeros_like(self.rows)
        self.tokens = self.rows.new_zeros(len(distribution), distribution.patch_size)
        self.draws, self.saved = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.num_agreeing = torch.full_like(self.rows, self.power.whole)
        self.is_finite = torch.ones_like(self.rows, dtype=torch.bool)
        self.history: list[tuple[Tensor, AcceptedDraws]] = []

    def draw_wave(self, seed: Tensor, before: int, size: int) -> None:
        """Draw `size` more for each sequence without a chunk, after `before` earlier draws."""
        rows, distribution = self.rows, self.distribution.select(self.rows)
        prefix = None if self.prefix is None else self.prefix.select(rows)
        accepted = draw_accepted(distribution, prefix, size, seed[rows], self.method.noise_scale)
        self.history.append((rows, accepted))
        self.is_finite[rows] &= accepted.is_finite
        self.draws[rows] = before + size
        if not len(accepted.latents):
            return
        carried = [] if self.round_latent is None else [self.round_latent[None]]
        latents = torch.cat([*carried, accepted.latents])  # [1 + M, b, L], or [M, b, L]
        candidates = Candidates(distribution.slots(latents), distribution.project, *(prefix or ()))
        candidates.split(2)  # equal group numbers mean equal chunks now
        groups = candidates.groups
        if not carried:
            groups = torch.cat([groups[:, :1], groups], dim=1)
        outcome = run_rounds(
            groups,
            accepted.counts,
            self.power,
            num_equal=self.num_equal,
            stopping_draw=self._stopping_draws(seed[rows], size, len(accepted.latents)),
        )
        index = outcome.first if carried else (outcome.first - 1).clamp(min=0)
        self.tokens[rows] = candidates.tokens(index)
        self._count_draws(outcome, accepted, before)
        is_open = ~outcome.is_accepted
        self.rows = rows[is_open]
        self.num_equal = outcome.num_equal[is_open]
        self.factory_left = outcome.factory_left[is_open]
        self.round_latent = latents[index, torch.arange(len(rows), device=rows.device)][is_open]

    def _stopping_draws(self, seed: Tensor, size: int, num_accepted: int) -> Tensor | None:
        """`run_rounds`' `stopping_draw`, ``[b, n + M]``; None where 1/T is whole.

        Args:
            seed: ``[b, 2]``.
            size: draws of the wave.
            num_accepted: M.
        """
        whole, fraction = self.power
        if fraction == 0.0:
            return None
        uniforms = uniform_draws(
            len(seed),
            whole + size,
            stream=Stream.FACTORY,
            seed=seed,
            device=seed.device,
            dtype=torch.float64,
        )[:, : whole + num_accepted]
        fresh = factory_stopping_draw(uniforms, fraction, self.method.max_draws)
        is_running = (self.num_equal == whole)[:, None]  # its draw was decided in an earlier wave
        return torch.where(is_running, _with_first(fresh, self.factory_left), fresh)

    def _count_draws(self, outcome: Outcome, accepted: AcceptedDraws, before: int) -> None:
        """Count the draws of this wave, up to the one that ended a sequence's search."""
        rows = self.rows
        last = (outcome.used - 1).clamp(min=0, max=accepted.place.shape[1] - 1)
        place = accepted.place.gather(1, last[:, None])[:, 0]
        self.draws[rows] = torch.where(outcome.is_accepted, before + place + 1, self.draws[rows])
        self.saved[rows] += outcome.saved

    def chunk(self) -> Chunk:
        """The result; sequences that have no chunk yet get theirs from Algorithm 2."""
        is_fallback = torch.zeros_like(self.is_finite)
        if len(self.rows):
            rows = self.rows
            is_fallback[rows] = True
            latents, count = self._all_draws(rows)
            prefix = self.prefix or Prefix(
                torch.zeros_like(self.tokens), torch.zeros_like(self.draws)
            )
            self.tokens[rows], self.num_agreeing[rows] = vote_by_count(
                self.distribution.select(rows),
                latents,
                count,
                self.method.temperature,
                seed=self.seed[rows],
                prefix=prefix.select(rows),
            )
        record = chunk_record(
            self.tokens,
            self.is_finite,
            num_agreeing=self.num_agreeing,
            draws=self.draws + self.saved,
            is_fallback=is_fallback,
            saved=self.saved,
        )
        return Chunk(record)

    def _all_draws(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All accepted draws of `rows`, in order, ``[M, b, L]``, and how many, ``[b]``."""
        parts, masks = [], []
        for drawn, accepted in self.history:  # `drawn` is sorted and holds all of `rows`
            index = torch.searchsorted(drawn, rows)
            parts.append(accepted.latents[:, index])
            place = torch.arange(len(accepted.latents), device=rows.device)[:, None]
            masks.append(place < accepted.counts[index])
        latents, is_draw = torch.cat(parts), torch.cat(masks)
        order = (~is_draw).to(torch.uint8).argsort(dim=0, stable=True)
        latents = latents.gather(0, order[..., None].expand_as(latents))
        return latents, is_draw.sum(0)


def _with_first(values: Tensor, first: Tensor) -> Tensor:
    """`values` ``[b, n]`` with another first column."""
    return torch.cat([first[:, None], values[:, 1:]], dim=1)
