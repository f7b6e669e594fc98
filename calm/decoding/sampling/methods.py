"""Sampling methods: how the next chunk is chosen from draws of the head.

| method | law at temperature T | head draws a chunk |
|---|---|---|
| `Direct` | P (T = 1 alone) | 1 |
| `Batch` | tends to P^(1/T) as N grows (Algorithm 2) | N |
| `Exact` | P^(1/T), or Algorithm 2 at its cap (Algorithm 1) | as many as it takes |
| `Medoid` | none stated: the middle of N draws | N, of which one is decoded |
| `NoiseScale` | none stated: what the head's noise contributes is narrowed | 1 |

At T = 1 all are `Direct`. Any of them also completes a chunk whose first tokens are known: what is
drawn are then the head's draws that begin with them, in order.

Shapes: B sequences, N draws, L latent size, K tokens of a chunk.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from calm.decoding.chunk import Chunk
from calm.decoding.sampling.chunk_distribution import ChunkDistribution, Method, decode
from calm.decoding.sampling.exact import Exact
from calm.decoding.sampling.prefix_rejection import CollectedDraws, Prefix, collect_accepted
from calm.decoding.sampling.voting import split_power, vote, vote_by_count
from calm.errors import UserError

__all__ = ["METHODS", "Batch", "Direct", "Exact", "Medoid", "NoiseScale", "build_method"]

MAX_WAVES = 25  # of N draws, by default, that a chunk may take


@dataclass(frozen=True, kw_only=True)
class Direct:
    """One draw.

    Attributes:
        num_samples: draws a wave while a chunk is completed.
        noise_scale: factor on the head's noise.
        max_draws: draws a chunk at most while it is completed.
    """

    num_samples: int = 200
    noise_scale: float = 1.0
    max_draws: int = MAX_WAVES * 200
    is_capturable: ClassVar[bool] = True

    @property
    def noise_spread(self) -> float:
        """Factor on what the noise contributes, see `GenerativeHead.sample`."""
        return 1.0

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return 1

    def choose(self, source: ChunkDistribution, seed: Tensor) -> Chunk:
        """See `Method`."""
        latents = source.latents(
            self.needed, seed, noise_scale=self.noise_scale, noise_spread=self.noise_spread
        )
        count = torch.full((len(source),), self.needed, device=source.device)
        is_finite = torch.isfinite(latents).all(-1).all(0)
        tokens, level = self._pick(source, latents, seed)
        return Chunk(tokens, level, count, torch.zeros_like(is_finite), is_finite)

    def complete(
        self, source: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """See `Method`; flagged where fewer than the `needed` draws were found."""
        known = Prefix(given, given_length)
        found = collect_accepted(
            source,
            known,
            needed=self.needed,
            wave_size=self.num_samples,
            max_draws=self.max_draws,
            seed=seed,
            noise_scale=self.noise_scale,
            noise_spread=self.noise_spread,
        )
        tokens, level = self._pick_completion(source, found, known, seed)
        return Chunk(tokens, level, found.draws, found.counts < self.needed, found.is_finite)

    def _pick(
        self, source: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, K]`` and level ``[B]`` from draws ``[needed, B, L]``."""
        return decode(source, latents[0]), torch.ones_like(seed[:, 0])

    def _pick_completion(
        self, source: ChunkDistribution, found: CollectedDraws, known: Prefix, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from draws that fit."""
        tokens = decode(source, self._representative(found))
        has_any = found.counts > 0
        return torch.where(has_any[:, None], tokens, known.tokens), has_any.to(torch.int64)

    def _representative(self, found: CollectedDraws) -> Tensor:
        """The latent to decode, ``[B, L]``."""
        return found.latents[0]


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Direct):
    """One draw, with what the head's noise contributes times s = T².

    A factor on the noise itself would do nothing in the energy head, which normalises the embedded
    noise: s stands behind that norm. √T would turn a normal law P into P^(1/T) in a head linear in
    normal noise; later norms undo part of it in a deep one, and T² came nearest to exact laws in a
    trained energy head (docs/temperature.md). A heuristic: its law is not P^(1/T). Its cost does
    not depend on T.

    Attributes:
        temperature: T in (0, 1].
    """

    temperature: float = 0.5

    @property
    def noise_spread(self) -> float:
        """T²."""
        return self.temperature**2


@dataclass(frozen=True, kw_only=True)
class Batch(Direct):
    """Algorithm 2: N draws, and a vote of 1/T of them that agree.

    Attributes:
        temperature: T in (0, 1].
        num_samples: N.
        is_slotwise: decode slot by slot, with sizes that the host reads; None does so on a CPU.
    """

    temperature: float = 0.5
    is_slotwise: bool | None = None

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return self.num_samples

    def _pick(
        self, source: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        return vote(source, latents, self.temperature, seed=seed, is_slotwise=self.is_slotwise)

    def _pick_completion(
        self, source: ChunkDistribution, found: CollectedDraws, known: Prefix, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        return vote_by_count(
            source, found.latents, found.counts, self.temperature, seed=seed, known=known
        )


@dataclass(frozen=True, kw_only=True)
class Medoid(Direct):
    """Of N draws the one whose mean distance to the others is least; it alone is decoded.

    N sets how much the law narrows: 1 is a plain draw. T does not enter. Costs N head draws and
    O(N² L) a sequence.

    Attributes:
        num_samples: N.
    """

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return self.num_samples

    def _pick(
        self, source: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = torch.full_like(seed[:, 0], len(latents))
        return decode(source, medoid(latents, count)), torch.ones_like(count)

    def _representative(self, found: CollectedDraws) -> Tensor:
        return medoid(found.latents, found.counts)


def medoid(latents: Tensor, count: Tensor) -> Tensor:
    """Of the first `count` ``[B]`` latents ``[N, B, L]`` of a row the middle one, ``[B, L]``.

    argmin_i Σ_j |x_i - x_j|, the first of equals; the first latent where the count is 0.
    """
    by_row = latents.transpose(0, 1).to(torch.float32)  # [B, N, L]
    by_row = by_row - by_row.mean(1, keepdim=True)  # small numbers have accurate distances
    is_draw = torch.arange(len(latents), device=count.device) < count[:, None]  # [B, N]
    distances = torch.cdist(by_row, by_row).masked_fill(~is_draw[:, None], 0.0).sum(-1)
    index = distances.masked_fill(~is_draw, math.inf).argmin(1)
    return latents[index, torch.arange(len(index), device=index.device)]


METHODS = ("direct", "batch", "exact", "medoid", "noise_scale")


def build_method(
    method: str = "batch",
    *,
    temperature: float = 0.5,
    num_samples: int = 200,
    noise_scale: float = 1.0,
    max_draws: int | None = None,
) -> Method:
    """The method of this name.

    Args:
        method: one of `METHODS`.
        temperature: T in (0, 1]; at 1 every method takes one draw.
        num_samples: N, draws of ``batch`` and ``medoid``; draws a wave of ``exact``, and of any
            method while it completes a chunk.
        noise_scale: factor on the head's noise, for every method.
        max_draws: draws a chunk of ``exact``, and of any method while it completes a chunk; by
            default 25 waves.

    Raises:
        UserError: an argument out of range, or a cap below what the method needs.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not 0.0 < temperature <= 1.0:
        raise UserError(f"temperature must lie in (0, 1], got {temperature}")
    if not isinstance(num_samples, int) or num_samples < 1:
        raise UserError(f"num_samples must be at least 1, a whole number; got {num_samples}")
    if not (noise_scale >= 0.0 and math.isfinite(noise_scale)):
        raise UserError(f"noise_scale must be finite and at least 0, got {noise_scale}")
    power = split_power(temperature)
    is_plain = power == (1, 0.0)
    if method == "direct" and not is_plain:
        raise UserError(
            f"method 'direct' draws from the model as it is: temperature must be 1, got "
            f"{temperature}; use {', '.join(METHODS[1:])} below 1"
        )
    least = {
        "exact": power.whole + (power.fraction > 0),
        "batch": num_samples,
        "medoid": num_samples,
    }
    needed = 1 if is_plain else least.get(method, 1)
    if max_draws is None:
        max_draws = MAX_WAVES * num_samples
    if not isinstance(max_draws, int) or max_draws < needed:
        raise UserError(
            f"max_draws must be at least {needed}, which method {method!r} needs for a chunk at "
            f"temperature {temperature}, a whole number; got {max_draws} (by default {MAX_WAVES} "
            "num_samples)"
        )
    common = _Common(num_samples=num_samples, noise_scale=noise_scale, max_draws=max_draws)
    if is_plain:
        return Direct(**common)
    if method == "medoid":
        return Medoid(**common)
    if method == "exact":
        return Exact(temperature=temperature, **common)
    return (Batch if method == "batch" else NoiseScale)(temperature=temperature, **common)


class _Common(TypedDict):
    """Fields that all methods have."""

    num_samples: int
    noise_scale: float
    max_draws: int
