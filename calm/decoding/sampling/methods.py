"""Sampling methods: how the next chunk is chosen from draws of the head.

| method | distribution at temperature T | head draws a chunk |
|---|---|---|
| `Direct` | P (T = 1 alone) | 1 |
| `Batch` | tends to P^(1/T) as N grows (Algorithm 2) | N |
| `Exact` | P^(1/T), or Algorithm 2 at its cap (Algorithm 1) | as many as it takes |
| `Medoid` | none stated: the middle of N draws | N, of which one is decoded |
| `NoiseScale` | none stated: what the head's noise contributes is narrowed | 1 |
| `Amortized` | that which a head has learned of the vote's winners | 1 |

At T = 1 all are `Direct`. Any of them also completes a chunk whose first tokens are given: it then
chooses among the head's draws that begin with these tokens, in the order drawn.

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
from calm_kernels import chunk_record

__all__ = [
    "MAX_WAVES", "METHODS", "READOUT", "Amortized", "Batch", "Direct", "Exact", "Medoid",
    "NoiseScale", "build_method",
]  # fmt: skip

MAX_WAVES = 25  # of N draws, by default, that a chunk may take


@dataclass(frozen=True, kw_only=True)
class Direct:
    """One draw.

    Attributes:
        num_samples: draws of a wave, while a chunk is completed.
        noise_scale: factor on the head's noise.
        max_draws: draws of a chunk at most, while it is completed.
    """

    num_samples: int = 200
    noise_scale: float = 1.0
    max_draws: int = MAX_WAVES * 200
    is_capturable: ClassVar[bool] = True
    is_one_draw: ClassVar[bool] = True

    @property
    def noise_spread(self) -> float:
        """Factor on what the noise contributes, see `GenerativeHead.sample`."""
        return 1.0

    @property
    def head_temperature(self) -> float:
        """See `Method`."""
        return 1.0

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return 1

    def choose(self, distribution: ChunkDistribution, seed: Tensor) -> Chunk:
        """See `Method`."""
        latents = distribution.latents(
            self.needed, seed, noise_scale=self.noise_scale, noise_spread=self.noise_spread
        )
        tokens, num_agreeing = self._pick(distribution, latents, seed)
        return Chunk(chunk_record(tokens, latents, num_agreeing=num_agreeing, draws=self.needed))

    def complete(
        self, distribution: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """See `Method`; flagged where fewer than the `needed` draws were found."""
        prefix = Prefix(given, given_length)
        found = collect_accepted(
            distribution,
            prefix,
            needed=self.needed,
            wave_size=self.num_samples,
            max_draws=self.max_draws,
            seed=seed,
            noise_scale=self.noise_scale,
            noise_spread=self.noise_spread,
        )
        tokens, num_agreeing = self._pick_completion(distribution, found, prefix, seed)
        record = chunk_record(
            tokens, found.is_finite, num_agreeing=num_agreeing, draws=found.draws,
            is_fallback=found.counts < self.needed,
        )  # fmt: skip
        return Chunk(record)

    def _pick(
        self, distribution: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor | int]:
        """Tokens ``[B, K]`` and `Chunk.num_agreeing`, ``[B]`` or one number, from draws
        ``[needed, B, L]``.
        """
        return decode(distribution, latents[0]), 1

    def _pick_completion(
        self, distribution: ChunkDistribution, found: CollectedDraws, prefix: Prefix, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from accepted draws."""
        tokens = decode(distribution, self._representative(found))
        has_any = found.counts > 0
        return torch.where(has_any[:, None], tokens, prefix.tokens), has_any.to(torch.int64)

    def _representative(self, found: CollectedDraws) -> Tensor:
        """The latent to decode, ``[B, L]``."""
        return found.latents[0]


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Direct):
    """One draw, with what the head's noise contributes times s = T².

    The energy head normalises the embedded noise, so that a factor on the noise itself would do
    nothing there: s is applied after that norm. Why T²: in a head that is linear in normal noise,
    √T would turn P into P^(1/T). In a deep head later norms undo part of the factor, and T² came
    nearest to P^(1/T) in a trained energy head (docs/temperature.md). This is a heuristic: its
    distribution is not P^(1/T). Its cost does not depend on T.

    Attributes:
        temperature: T in (0, 1].
    """

    temperature: float = 0.5

    @property
    def noise_spread(self) -> float:
        """T²."""
        return self.temperature**2


@dataclass(frozen=True, kw_only=True)
class Amortized(Direct):
    """One draw of a head that takes T, see `calm.models.heads.tempered`.

    Its distribution has to be one of that head's, of `head_temperature`.

    Attributes:
        temperature: T in (0, 1].
    """

    temperature: float = 0.5

    @property
    def head_temperature(self) -> float:
        """T."""
        return self.temperature


@dataclass(frozen=True, kw_only=True)
class Batch(Direct):
    """Algorithm 2: N draws, and a vote of 1/T of them that agree.

    Attributes:
        temperature: T in (0, 1].
        num_samples: N.
        is_slotwise: decode token by token and skip what cannot matter, see `vote`; None does so on
            a CPU.
    """

    temperature: float = 0.5
    is_slotwise: bool | None = None
    is_one_draw: ClassVar[bool] = False

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return self.num_samples

    def _pick(
        self, distribution: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor | int]:
        return vote(
            distribution, latents, self.temperature, seed=seed, is_slotwise=self.is_slotwise
        )

    def _pick_completion(
        self, distribution: ChunkDistribution, found: CollectedDraws, prefix: Prefix, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        return vote_by_count(
            distribution, found.latents, found.counts, self.temperature, seed=seed, prefix=prefix
        )


@dataclass(frozen=True, kw_only=True)
class Medoid(Direct):
    """Of N draws the one whose mean distance to the others is least; it alone is decoded.

    N sets how much the distribution narrows: 1 is a plain draw. T does not matter. A sequence costs
    N head draws and O(N² L).

    Attributes:
        num_samples: N.
    """

    is_one_draw: ClassVar[bool] = False

    @property
    def needed(self) -> int:
        """Draws that a chunk is chosen from."""
        return self.num_samples

    def _pick(
        self, distribution: ChunkDistribution, latents: Tensor, seed: Tensor
    ) -> tuple[Tensor, Tensor | int]:
        count = torch.full_like(seed[:, 0], len(latents))
        return decode(distribution, medoid(latents, count)), 1

    def _representative(self, found: CollectedDraws) -> Tensor:
        return medoid(found.latents, found.counts)


def medoid(latents: Tensor, count: Tensor) -> Tensor:
    """The medoid of the first `count` ``[B]`` latents ``[N, B, L]`` of each sequence, ``[B, L]``.

    argmin_i Σ_j |x_i - x_j|; the first of several, and the first latent where the count is 0.
    """
    by_row = latents.transpose(0, 1).to(torch.float32)  # [B, N, L]
    by_row = by_row - by_row.mean(1, keepdim=True)  # small numbers have accurate distances
    is_draw = torch.arange(len(latents), device=count.device) < count[:, None]  # [B, N]
    distances = torch.cdist(by_row, by_row).masked_fill(~is_draw[:, None], 0.0).sum(-1)
    index = distances.masked_fill(~is_draw, math.inf).argmin(1)
    return latents[index, torch.arange(len(index), device=index.device)]


METHODS = ("direct", "batch", "exact", "medoid", "noise_scale", "amortized")
READOUT = "readout"  # no choice among draws: see `calm.decoding.sampling.token_draws`


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
        num_samples: N, draws of ``batch`` and ``medoid``; draws of a wave of ``exact``, and of any
            method while it completes a chunk.
        noise_scale: factor on the head's noise, for every method.
        max_draws: draws of a chunk at most for ``exact``, and for any method while it completes a
            chunk; by default 25 waves.

    Raises:
        UserError: an argument out of range, or `max_draws` below what the method needs.
    """
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, {READOUT}; got {method!r}")
    if not 0.0 < temperature <= 1.0:
        raise UserError(
            f"temperature must lie in (0, 1], got {temperature}; method {READOUT!r} takes any from "
            "0 on"
        )
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
    chosen = {"batch": Batch, "noise_scale": NoiseScale, "amortized": Amortized}[method]
    return chosen(temperature=temperature, **common)


class _Common(TypedDict):
    """Fields that all methods have."""

    num_samples: int
    noise_scale: float
    max_draws: int
