"""Brier-n of a model on token sequences: 2 P(y) - sum_x P(x)^2, for n-grams of 1 to 4 tokens.

Both terms are estimated without bias from draws. P(y) is teacher-forced. The collision term needs
two draws of the whole n-gram: inside a chunk the draws of one position serve, and an n-gram that
spans several chunks (K < 4, and the baseline, where K is 1) is rolled out, see
`calm.evaluation.rollout`. Source: paper, equations 12-15.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.errors import UserError
from calm.evaluation.rollout import Branches, chain_matches, roll_out
from calm.evaluation.samplers import ChunkSampler, make_sampler
from calm.models.agreement import MAX_ORDER
from calm_kernels.noise import Seed, as_seed

__all__ = ["PositionScores", "brier_scores", "brier_sums", "position_scores"]


class PositionScores(NamedTuple):
    """Brier-1 to Brier-4 of every n-gram of a batch of sequences.

    Attributes:
        terms: ``[B, starts, 4]``, float64; 0 where an n-gram does not count.
        is_counted: bool ``[B, starts]``.
        token: place in the sequence of the first token of each n-gram, int64 ``[starts]``.
    """

    terms: Tensor
    is_counted: Tensor
    token: Tensor


def brier_scores(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    num_samples: int = 8,
    brier_draws: int | None = None,
    noise_scale: float = 1.0,
    skip_repeats: bool = False,
    seed: Seed = 0,
) -> Mapping[str, Tensor]:
    """Brier-1 to Brier-4 of each sequence, averaged over its positions; higher is better.

    Positions are the published ones, so that numbers compare: with S predicted chunks, every one
    for K >= 4 (n-grams start at chunk starts), the first S - ceil(4 / K) for K < 4, and the first
    S - 4 of S predicted tokens for the baseline. A block's first chunk is not predicted. Where a
    start chunk precedes a document (``has_start_patch``), labels mask start chunks and the padding
    of last chunks, so the document's first chunk counts and no n-gram spans two documents.

    Args:
        model: a CALM with any head and any K, or the token baseline.
        input_ids: ``[B, T]``, int64, T a multiple of K.
        labels: as `input_ids`, with negative ids at positions that do not count (padding). An
            n-gram with such a position is skipped. Default: all count.
        num_samples: N >= 2 draws a chunk.
        brier_draws: how many of them the score uses: None for all (pair-count U-statistic; exact
            probabilities for the baseline), 2 for the published estimator.
        noise_scale: factor on the head's noise; 0 scores the deterministic model.
        skip_repeats: skip n-grams that repeat one token four times, as in rulers and blank lines.
        seed: of the draws; the same whatever the batch size.

    Returns: ``{"brier1": [B], .., "brier4": [B]}``, float64; NaN for a sequence without positions.
    Raises:
        UserError: an argument out of range, T not a multiple of K or too short.
    Cost: one forward pass and N draws of each chunk; for K < 4 in addition ceil(4 / K) - 1 rollout
        steps.
    """
    sampler = make_sampler(
        model,
        num_samples=num_samples,
        brier_draws=brier_draws,
        noise_scale=noise_scale,
        seed=as_seed(seed, input_ids.device),
    )
    with evaluating(model):
        sums, counts = brier_sums(sampler, input_ids, labels, skip_repeats=skip_repeats)
    return {f"brier{order + 1}": sums[:, order] / counts for order in range(MAX_ORDER)}


def brier_sums(
    sampler: ChunkSampler,
    input_ids: Tensor,
    labels: Tensor | None,
    *,
    skip_repeats: bool = False,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sums of Brier-1 to Brier-4 over the positions of each sequence, and how many there are.

    Arguments as `position_scores`. Returns: sums ``[B, 4]`` and counts ``[B]``, both float64.
    """
    scores = position_scores(
        sampler, input_ids, labels, skip_repeats=skip_repeats, first_row=first_row
    )
    return scores.terms.sum(1), scores.is_counted.sum(1).to(torch.float64)


def position_scores(
    sampler: ChunkSampler,
    input_ids: Tensor,
    labels: Tensor | None,
    *,
    skip_repeats: bool = False,
    first_row: int = 0,
) -> PositionScores:
    """Brier-1 to Brier-4 of the n-grams that start at each scored position.

    Args:
        sampler: of the model, see `calm.evaluation.samplers`.
        input_ids: ``[B, T]``.
        labels: as `brier_scores`.
        skip_repeats: as `brier_scores`.
        first_row: number of chunks in all earlier sequences; addresses the draws.
    """
    labels = input_ids if labels is None else labels
    predictor = sampler.predictor
    size = predictor.patch_size
    chunks = math.ceil(MAX_ORDER / size)
    inputs = predictor.embed(_checked(input_ids, labels, size, chunks))[:, :-1]
    predicted = inputs.shape[1]  # S
    labels = labels[:, -predicted * size :]
    starts = predicted if chunks == 1 else predicted - chunks
    batch, device = len(input_ids), input_ids.device
    total = input_ids.shape[1] // size
    rows = first_row + torch.arange(batch * total, device=device).view(batch, total)[:, :predicted]

    target = labels.unflatten(1, (-1, size))  # [B, S, K]
    branches = Branches(predictor.backbone, inputs)
    first = sampler.step(branches.hidden, target, rows, 0)
    assert first.matches is not None  # there was a target
    hits = chain_matches(first.matches, starts, chunks)[..., :MAX_ORDER].mean(0)
    collisions = roll_out(
        branches,
        first,
        starts,
        chunks,
        embed=lambda tokens: predictor.embed(tokens.flatten(1)),
        draw=lambda hidden, at, depth: sampler.step(hidden, None, rows[:, at], depth),
    )[..., :MAX_ORDER]

    windows = labels.unfold(1, MAX_ORDER, size)[:, :starts]  # [B, starts, 4]
    counted = (windows >= 0).all(-1)
    if skip_repeats:
        counted &= (windows != windows[..., :1]).any(-1)
    terms = (2.0 * hits - collisions).to(torch.float64) * counted[..., None]
    first_token = input_ids.shape[1] - predicted * size
    return PositionScores(terms, counted, first_token + size * torch.arange(starts, device=device))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model has its former mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _checked(input_ids: Tensor, labels: Tensor, size: int, chunks: int) -> Tensor:
    """`input_ids`; raises `UserError` if they cannot be scored."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise UserError(
            f"input_ids must be int64 [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if labels.shape != input_ids.shape:
        raise UserError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}; "
            f"got {tuple(labels.shape)}"
        )
    length = input_ids.shape[1]
    shortest = size * (2 if chunks == 1 else chunks + 2)
    if length % size or length < shortest:
        raise UserError(
            f"input_ids must be a multiple of the chunk size {size} long, and at least {shortest}; "
            f"got {length} tokens"
        )
    return input_ids
