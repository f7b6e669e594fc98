"""Candidates for the next chunk: hidden state -> head -> latents -> tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm.errors import UserError
from calm.models.continuous import ContinuousTransformer
from calm_kernels.noise import Seed, Stream, as_seed, philox

__all__ = ["advance", "draw_completions", "draw_patches", "row_of", "sequence_seeds"]

WORD = 0xFFFFFFFF
ROUND_STRIDE = 2**40  # rounds of one chunk draw from disjoint ranges of the seed's offset


def draw_patches(
    model: ContinuousTransformer,
    hidden: Tensor,
    *,
    num_samples: int,
    seed: Tensor,
    noise_scale: float = 1.0,
) -> Tensor:
    """N independent draws of the chunk that follows each hidden state.

    Args:
        model: a CALM.
        hidden: backbone states ``[..., H]``.
        num_samples: N >= 1.
        seed: int64 ``[2]``, or ``[rows, 2]`` with a stream for each row of `hidden`.
        noise_scale: factor on the head's noise; 0 is deterministic.

    Returns: token ids ``[N, ..., K]``.
    Raises:
        UserError: the head gave a latent that is not finite.
    Cost: N head samples and N vocabulary searches a row; nothing of size candidates x vocabulary.
    """
    latents = model.generative_head.sample(
        hidden, num_samples=num_samples, seed=seed, noise_scale=noise_scale
    )
    if not torch.isfinite(latents).all():
        raise UserError(
            "the head drew latents that are not finite: the weights are damaged or training "
            "diverged; load an earlier checkpoint"
        )
    return model.decode_latents(latents)


def draw_completions(
    model: ContinuousTransformer,
    hidden: Tensor,
    given: Tensor,
    *,
    needed: int,
    num_samples: int,
    max_draws: int,
    seed: Tensor,
    noise_scale: float = 1.0,
) -> tuple[list[Tensor], int]:
    """Draws of the next chunk that begin with tokens which are already known, by rejection.

    What is kept follows the model's own law given those tokens. Draws come in rounds of
    `num_samples` until every row has kept `needed`, or `max_draws` are spent.

    Args:
        model: a CALM.
        hidden: ``[B, H]``.
        given: the first r tokens of the chunk, ``[B, r]``.
        needed: draws to keep for each row.
        num_samples: draws a round.
        max_draws: draws a row at most.
        seed: int64 ``[2]`` or ``[B, 2]``.
        noise_scale: factor on the head's noise.

    Returns: for each row the chunks kept, ``[1 .. needed, K]``, in the order drawn; draws a row.
    Raises:
        UserError: a row kept none.
    """
    kept: list[list[Tensor]] = [[] for _ in range(len(hidden))]
    drawn = 0
    while drawn < max_draws and min(map(_total, kept)) < needed:
        round_seed = advance(seed, drawn // num_samples * ROUND_STRIDE)
        candidates = draw_patches(
            model, hidden, num_samples=num_samples, seed=round_seed, noise_scale=noise_scale
        )  # [N, B, K]
        fits = (candidates[..., : given.shape[1]] == given).all(-1)
        for row, chunks in enumerate(kept):
            chunks.append(candidates[fits[:, row], row])
        drawn += num_samples
    for row, chunks in enumerate(kept):
        if _total(chunks) == 0:
            raise UserError(
                f"none of {drawn} draws begins with {given[row].tolist()}, the tokens at the end "
                "of the prompt that fill no whole chunk; raise max_draws, or pass "
                'prompt_alignment="pad"'
            )
    return [torch.cat(chunks)[:needed] for chunks in kept], drawn


def sequence_seeds(seed: Seed | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """One seed for each sequence, int64 ``[B, 2]`` of (seed, offset).

    A list gives them. One seed for the batch is that of row 0; row b > 0 gets 64 bits of Philox
    with the seed as key and b as counter, so that neighbouring seeds share no stream.

    Args:
        seed: see `calm_kernels.noise.as_seed`, or a list of B ints.
        batch: B.
        device: where draws are made.
    """
    if isinstance(seed, Sequence):
        if len(seed) != batch:
            raise UserError(f"seed must hold one number per sequence, {batch}; got {len(seed)}")
        return as_seed(torch.tensor(seed, dtype=torch.int64)[:, None], device)
    common = as_seed(seed, device)
    if common.dim() == 2:
        return common
    value, offset = common.expand(batch, 2).unbind(1)
    row = torch.arange(batch, device=device)
    zero = torch.zeros_like(row)
    key = (value & WORD, ((value >> 32) & WORD) ^ int(Stream.SEQUENCE))
    low, high, *_ = philox((row, zero, zero, zero), key)
    return torch.stack([torch.where(row == 0, value, low | (high << 32)), offset], dim=1)


def advance(seed: Tensor, steps: int | Tensor) -> Tensor:
    """The seed `steps` further on: other draws, addressed by `steps` alone."""
    offset = seed[..., 1] + steps
    return torch.stack([seed[..., 0].expand_as(offset), offset], dim=-1)


def row_of(seed: Tensor, row: int) -> tuple[Tensor, int]:
    """Seed and first row with which row `row` of a batch draws alone what it draws in the batch."""
    return (seed, row) if seed.dim() == 1 else (seed[row : row + 1], 0)


def _total(chunks: list[Tensor]) -> int:
    return sum(map(len, chunks))
