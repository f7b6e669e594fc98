"""Temperature for a model that can only be sampled: 1/T draws that agree.

P(x)^(1/T) cannot be computed without probabilities. But where 1/T independent draws of the model
are equal, their value follows this distribution. `calm.decoding.sampling.exact` draws until that
happens (Algorithm 1); the vote here searches N candidates for it (Algorithm 2,
`calm_kernels.agreeing_patch`).

Shapes: B sequences, N candidates, L latent size, K tokens of a chunk.
"""

import math
from typing import NamedTuple

from torch import Tensor, zeros_like

from calm.decoding.sampling.chunk_distribution import ChunkDistribution, decode
from calm.decoding.sampling.lazy_decode import Candidates, decode_and_vote
from calm.decoding.sampling.prefix_rejection import Prefix
from calm.errors import UserError
from calm_kernels.agreeing_patch import agreeing_patch, vote_chances
from calm_kernels.backend import is_host_readable

__all__ = ["Power", "split_power", "vote", "vote_by_count", "vote_distribution"]

TOLERANCE = 1e-6  # as in `calm_kernels.agreeing_patch`


class Power(NamedTuple):
    """1/T = whole + fraction."""

    whole: int
    fraction: float


def split_power(temperature: float) -> Power:
    """1/T = n + a with n >= 1 and 0 <= a < 1; a is 0 within rounding, 1e-6 relative.

    Args:
        temperature: T in (0, 1].

    Raises:
        UserError: 1/T is infinite.
    """
    power = 1.0 / temperature
    if math.isinf(power):
        raise UserError(f"temperature must be so large that 1/T is finite, got {temperature}")
    nearest = round(power)
    if abs(power - nearest) <= TOLERANCE * power:
        return Power(nearest, 0.0)
    return Power(math.floor(power), power - math.floor(power))


def vote(
    distribution: ChunkDistribution,
    latents: Tensor,
    temperature: float,
    *,
    seed: Tensor,
    prefix: Prefix | None = None,
    is_slotwise: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """One of the N candidates of each row, as if 1/T independent draws had agreed on it.

    Candidates are decoded either token by token, only as far as the choice depends on them, or in
    full, with fixed shapes and without synchronising. The choice is the same.

    Args:
        distribution: whose decoder turns latents into tokens.
        latents: ``[N, B, L]``.
        temperature: T in (0, 1].
        seed: int64 ``[B, 2]``.
        prefix: first tokens that all candidates of a row share.
        is_slotwise: decode token by token; None does so where `is_host_readable`.

    Returns: tokens ``[B, K]`` and how many draws agreed, ``[B]``.
    Source: CALM, Algorithm 2; for 1/T that is not whole see `calm_kernels.agreeing_patch`.
    """
    if is_slotwise is None:
        is_slotwise = is_host_readable(latents)
    if not is_slotwise:
        chunks = decode(distribution, latents).transpose(0, 1)  # [B, N, K]
        tokens, num_agreeing, *_ = agreeing_patch(chunks, 1.0 / temperature, seed=seed)
        return tokens, num_agreeing
    candidates = Candidates(distribution.slots(latents), distribution.project, *(prefix or ()))
    return decode_and_vote(candidates, temperature, seed=seed)


def vote_distribution(
    distribution: ChunkDistribution, latents: Tensor, num_agreeing: float | Tensor
) -> Tensor:
    """The chance of each candidate, its chunk's chance to win `vote` shared among equal ones.

    The candidates with these chances are a mixture of latents that has the distribution of `vote`'s
    winner, given the draws, and none of the vote's own randomness.

    Args:
        distribution: whose decoder turns latents into tokens.
        latents: ``[N, B, L]``.
        num_agreeing: 1/T >= 1, a number or ``[B]``.

    Returns: float64 ``[N, B]``; each column sums to 1.
    """
    if is_host_readable(latents):  # decoded as far as two candidates may be equal
        candidates = Candidates(distribution.slots(latents), distribution.project)
        candidates.split(2)
        chunks = candidates.groups[..., None]
    else:
        chunks = decode(distribution, latents).transpose(0, 1)  # [B, N, K]
    return vote_chances(chunks, num_agreeing).T


def vote_by_count(
    distribution: ChunkDistribution,
    latents: Tensor,
    count: Tensor,
    temperature: float,
    *,
    seed: Tensor,
    prefix: Prefix,
) -> tuple[Tensor, Tensor]:
    """`vote` where rows have different numbers of candidates; rows of equal numbers vote together.

    Args:
        distribution: whose decoder turns latents into tokens.
        latents: ``[N, B, L]``, of which the first `count` of a row are candidates.
        count: ``[B]``, 0 to N.
        temperature: T in (0, 1].
        seed: int64 ``[B, 2]``.
        prefix: first tokens of all candidates; without candidates, its tokens are the result.

    Returns: tokens ``[B, K]`` and how many draws agreed, ``[B]``, 0 without candidates.
    """
    tokens, num_agreeing = prefix.tokens.clone(), zeros_like(count)
    for size in count.unique().tolist():
        rows = (count == size).nonzero()[:, 0]
        if size:
            tokens[rows], num_agreeing[rows] = vote(
                distribution.select(rows),
                latents[:size, rows],
                temperature,
                seed=seed[rows],
                prefix=prefix.select(rows),
            )
    return tokens, num_agreeing
