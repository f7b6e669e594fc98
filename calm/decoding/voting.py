"""Algorithm 2 on latents: decode candidates as far as needed, and let 1/T of them agree.

Shapes: B sequences, N candidates, L latent size, K tokens of a chunk.
"""

import torch
from torch import Tensor

from calm.decoding.conditioning import Known
from calm.decoding.slots import Candidates, decode_and_vote
from calm.decoding.source import Source, decode
from calm_kernels.agreeing_patch import agreeing_patch

__all__ = ["vote", "vote_by_count"]


def vote(
    source: Source,
    latents: Tensor,
    temperature: float,
    *,
    seed: Tensor,
    known: Known | None = None,
    is_slotwise: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """One of the N candidates of each row, as if 1/T independent draws had agreed on it.

    Candidates are decoded slot by slot, only as far as the choice depends on them, or in full, in
    fixed shapes and without reading anything back; the choice is the same.

    Args:
        source: decodes.
        latents: ``[N, B, L]``.
        temperature: T in (0, 1].
        seed: int64 ``[B, 2]``.
        known: first tokens that all candidates of a row share.
        is_slotwise: decode slot by slot; None does so except on a GPU.

    Returns: tokens ``[B, K]`` and how many draws agreed, ``[B]``.
    Source: paper, Algorithm 2, and for 1/T that is not whole `calm_kernels.agreeing_patch`.
    """
    if not (is_slotwise if is_slotwise is not None else not latents.is_cuda):
        patches = decode(source, latents).transpose(0, 1)  # [B, N, K]
        tokens, level, *_ = agreeing_patch(patches, 1.0 / temperature, seed=seed)
        return tokens, level
    candidates = Candidates(source.slots(latents), source.project, *(known or ()))
    return decode_and_vote(candidates, temperature, seed=seed)


def vote_by_count(
    source: Source,
    latents: Tensor,
    count: Tensor,
    temperature: float,
    *,
    seed: Tensor,
    known: Known,
) -> tuple[Tensor, Tensor]:
    """`vote` where rows have different numbers of candidates; rows of equal numbers vote together.

    Args:
        source: decodes.
        latents: ``[N, B, L]``, of which the first `count` of a row are candidates.
        count: ``[B]``, 0 to N.
        temperature: T in (0, 1].
        seed: int64 ``[B, 2]``.
        known: first tokens of all candidates; without candidates, its tokens are the result.

    Returns: tokens ``[B, K]`` and level ``[B]``, 0 without candidates.
    """
    tokens, level = known.tokens.clone(), torch.zeros_like(count)
    for size in count.unique().tolist():
        rows = (count == size).nonzero()[:, 0]
        if size:
            tokens[rows], level[rows] = vote(
                source.select(rows),
                latents[:size, rows],
                temperature,
                seed=seed[rows],
                known=known.select(rows),
            )
    return tokens, level
