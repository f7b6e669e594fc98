"""Algorithm 1: draws in order until 1/T of them agree, exactly P^(1/T) for any temperature.

Shapes: B sequences, b of them still without a chunk, W draws of a wave of which M fit, L latent
size, K tokens of a chunk.
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
from calm_kernels.noise import Stream, uniform

__all__ = ["Exact"]

FIRST_WAVE = 16  # draws


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Algorithm 1 with its Bernoulli factory, over waves of draws in order.

    With 1/T = n + a and Z = Σ P(x)^(1/T), a chunk takes (n + [a > 0] Σ P(x)^(1/T - 1)) / Z draws on
    average, as the algorithm is written (`Chunk.draws`): n a round. A sequence that has its chunk
    draws no more. One that comes to its cap is decided by Algorithm 2 over all draws it made, and
    flagged; if none of them begins with what is known of the chunk, by what was given.

    Attributes:
        temperature: T in (0, 1].
        num_samples: draws of a wave at most; the law does not depend on it.
        noise_scale: factor on the head's noise.
        max_draws: draws of a chunk at most.

    Source: CALM, Algorithm 1 and Theorem 2.
    """

    temperature: float = 0.5
    num_samples: int = 200
    noise_scale: float = 1.0
    max_draws: int = 5000
    is_capturable: ClassVar[bool] = False

    def choose(self, source: ChunkDistribution, seed: Tensor) -> Chunk:
        """See `Method`."""
        return self._search(source, None, seed)

    def complete(
        self, source: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """See `Method`."""
        return self._search(source, Prefix(given, given_length), seed)

    def _search(self, source: ChunkDistribution, known: Prefix | None, seed: Tensor) -> Chunk:
        search = _Search(self, source, known, seed)
        plan = waves(seed, self.num_samples, self.max_draws, first=FIRST_WAVE)
        for wave_seed, before, size in plan:
            search.draw_wave(wave_seed, before, size)
            if not len(search.rows):
                break
        return search.chunk()


class _Search:
    """Algorithm 1 of a batch, wave by wave.

    Attributes:
        rows: sequences without a chunk, ``[b]``; each has a round that may be unfinished: a latent
            of its patch, how many draws are equal to it, and how long its factory still stopping.
    """

    def __init__(
        self, method: Exact, source: ChunkDistribution, known: Prefix | None, seed: Tensor
    ) -> None:
        self.method, self.source, self.known, self.seed = method, source, known, seed
        self.power = split_power(method.temperature)
        self.rows = torch.arange(len(source), device=source.device)
        self.held: Tensor | None = None  # [b, L]
        self.run, self.left = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.tokens = self.rows.new_zeros(len(source), source.patch_size)
        self.draws, self.saved = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.level = torch.full_like(self.rows, self.power.whole)
        self.is_finite = torch.ones_like(self.rows, dtype=torch.bool)
        self.history: list[tuple[Tensor, AcceptedDraws]] = []

    def draw_wave(self, seed: Tensor, before: int, size: int) -> None:
        """Draw `size` more for each sequence without a chunk, `before` having been drawn."""
        rows, source = self.rows, self.source.select(self.rows)
        known = None if self.known is None else self.known.select(rows)
        part = draw_accepted(source, known, size, seed[rows], self.method.noise_scale)
        self.history.append((rows, part))
        self.is_finite[rows] &= part.is_finite
        self.draws[rows] = before + size
        if not len(part.latents):
            return
        held = [] if self.held is None else [self.held[None]]
        latents = torch.cat([*held, part.latents])  # [1 + M, b, L], or [M, b, L]
        candidates = Candidates(source.slots(latents), source.project, *(known or ()))
        candidates.split(2)  # equal groups are equal patches now
        groups = candidates.groups
        if not held:
            groups = torch.cat([groups[:, :1], groups], dim=1)
        stopping = self._stopping_draws(seed[rows], size, len(part.latents))
        outcome = run_rounds(groups, part.counts, self.power, run=self.run, stopping=stopping)
        index = outcome.first if held else (outcome.first - 1).clamp(min=0)
        self.tokens[rows] = candidates.tokens(index)
        self._record(outcome, part, before)
        stays = ~outcome.is_accepted
        self.rows, self.run, self.left = (
            rows[stays],
            outcome.run[stays],
            outcome.factory_left[stays],
        )
        self.held = latents[index, torch.arange(len(rows), device=rows.device)][stays]

    def _stopping_draws(self, seed: Tensor, size: int, fitting: int) -> Tensor | None:
        """Draws that the factory of the round beginning at each draw stopping, ``[b, n + M]``."""
        whole, fraction = self.power
        if fraction == 0.0:
            return None
        uniforms = uniform(
            len(seed),
            whole + size,
            stream=Stream.FACTORY,
            seed=seed,
            device=seed.device,
            dtype=torch.float64,
        )[:, : whole + fitting]
        stopping = factory_stopping_draw(uniforms, fraction, self.method.max_draws)
        return torch.where((self.run == whole)[:, None], _with_first(stopping, self.left), stopping)

    def _record(self, outcome: Outcome, part: AcceptedDraws, before: int) -> None:
        """Count the draws of this wave."""
        rows = self.rows
        last = (outcome.used - 1).clamp(min=0, max=part.place.shape[1] - 1)
        place = part.place.gather(1, last[:, None])[:, 0]
        self.draws[rows] = torch.where(outcome.is_accepted, before + place + 1, self.draws[rows])
        self.saved[rows] += outcome.saved

    def chunk(self) -> Chunk:
        """The result, with Algorithm 2 for the sequences that are left."""
        is_fallback = torch.zeros_like(self.is_finite)
        if len(self.rows):
            rows = self.rows
            is_fallback[rows] = True
            latents, count = self._all_draws(rows)
            known = self.known or Prefix(
                torch.zeros_like(self.tokens), torch.zeros_like(self.draws)
            )
            self.tokens[rows], self.level[rows] = vote_by_count(
                self.source.select(rows),
                latents,
                count,
                self.method.temperature,
                seed=self.seed[rows],
                known=known.select(rows),
            )
        return Chunk(
            self.tokens,
            self.level,
            self.draws + self.saved,
            is_fallback,
            self.is_finite,
            self.saved,
        )

    def _all_draws(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All draws of `rows` that fit, first in each row: ``[M, b, L]``, and how many, ``[b]``."""
        parts, masks = [], []
        for drawn, part in self.history:  # rows are in order, and in every wave
            index = torch.searchsorted(drawn, rows)
            parts.append(part.latents[:, index])
            masks.append(
                torch.arange(len(part.latents), device=rows.device)[:, None] < part.counts[index]
            )
        latents, is_draw = torch.cat(parts), torch.cat(masks)
        order = (~is_draw).to(torch.uint8).argsort(dim=0, stable=True)
        latents = latents.gather(0, order[..., None].expand_as(latents))
        return latents, is_draw.sum(0)


def _with_first(values: Tensor, first: Tensor) -> Tensor:
    """`values` ``[b, n]`` with another first column."""
    return torch.cat([first[:, None], values[:, 1:]], dim=1)
