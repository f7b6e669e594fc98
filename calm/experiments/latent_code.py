"""What kind of code the latents of an autoencoder are: sums over tokens, or more than that."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.experiments.latent_space import posteriors
from calm.models import ContinuousTransformer
from calm_kernels.energy_score import expected_distance

__all__ = ["LatentCode", "additive_share", "latent_code"]

ITERATIONS, TOLERANCE = 300, 1e-9  # of conjugate gradients
RIDGE = 1e-6
SEED = 0


@dataclass(frozen=True)
class LatentCode:
    """Means of the posterior, and how far apart they lie; distances are means over chunks.

    Attributes:
        additivity: see `additive_share`; 1 for a code that is a sum over slots, None where the text
            is too short to tell.
        noise: E|y - mean|, of a latent drawn from the posterior.
        changed_token: distance of the means of two chunks that differ in one token: in a slot drawn
            evenly, the token that another chunk of the text has there.
        neighbours: of chunks that follow each other in the text.
        others: of chunks from different places.
    """

    additivity: float | None
    noise: float
    changed_token: float
    neighbours: float
    others: float


def latent_code(model: ContinuousTransformer, blocks: Any) -> LatentCode:
    """The code of the autoencoder of `model`, over whole chunks of `blocks`."""
    chunks, mean, std = posteriors(model, blocks)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(chunks), generator=generator).to(chunks.device)
    slots = torch.randint(model.patch_size, (len(chunks), 1), generator=generator)
    slots = slots.to(chunks.device)
    changed = chunks.scatter(1, slots, chunks[order].gather(1, slots))
    differs = (changed != chunks).any(-1)
    if not differs.any():
        raise UserError("the text repeats one chunk: no token of it can be changed; pass more text")
    autoencoder: Any = model.ae_model
    with evaluating(model):
        moved = autoencoder.encoder(input_ids=changed[differs]).squeeze(1).float()
    moved = moved.chunk(2, dim=-1)[0]
    return LatentCode(
        additivity=additive_share(chunks, mean, model.config.vocab_size),
        noise=float(expected_distance(torch.zeros_like(std), std).mean()),
        changed_token=float((moved - mean[differs]).norm(dim=-1).mean()),
        neighbours=float((mean[1:] - mean[:-1]).norm(dim=-1).mean()),
        others=float((mean[order] - mean).norm(dim=-1).mean()),
    )


def additive_share(chunks: Tensor, values: Tensor, vocab_size: int) -> float | None:
    """Share of the variance of `values` that a sum over slots explains, on rows it was not fit to.

    1 - Σ |v - c - Σ_j W_j(token_j)|² / Σ |v - mean v|², with c and W fit by least squares to the
    first half of the rows; of the second half the rows count whose tokens all occur there in their
    slots.

    Args:
        chunks: ``[R, K]``.
        values: ``[R, L]``.
        vocab_size: V.

    Returns: at most 1; below 0 where the fit is worse than the mean. None if fewer than two
        different chunks of the second half count.
    Memory: ``K * V * L`` doubles, several times.
    """
    slots = chunks + vocab_size * torch.arange(chunks.shape[1], device=chunks.device)
    values, half = values.double(), len(chunks) // 2
    known = torch.zeros(vocab_size * chunks.shape[1], dtype=torch.bool, device=chunks.device)
    known[slots[:half]] = True
    is_known = known[slots[half:]].all(-1)
    if len(chunks[half:][is_known].unique(dim=0)) < 2:
        return None
    centre = values[:half].mean(0)
    weights = _least_squares(slots[:half], values[:half] - centre, len(known))
    test, there = values[half:][is_known], slots[half:][is_known]
    residual = test - centre - weights[there].sum(1)
    return float(1 - residual.square().sum() / (test - test.mean(0)).square().sum())


def _least_squares(slots: Tensor, values: Tensor, width: int) -> Tensor:
    """W ``[width, L]`` that makes Σ_j W[slot_j] nearest to `values` ``[R, L]``.

    Conjugate gradients on the normal equations, a column each; neither the one-hot matrix nor its
    square is formed. They start at 0, so that what the data leaves open stays 0.
    """

    def gathered(wanted: Tensor) -> Tensor:  # X^T, [R, L] to [width, L]
        total = wanted.new_zeros(width, wanted.shape[1])
        for column in slots.unbind(1):
            total.index_add_(0, column, wanted)
        return total

    weights = values.new_zeros(width, values.shape[1])
    residual = gathered(values)
    direction, size = residual, residual.square().sum(0)
    stop = TOLERANCE**2 * size
    for _ in range(ITERATIONS):
        if (size <= stop).all():
            break
        image = gathered(direction[slots].sum(1)) + RIDGE * direction
        step = size / (direction * image).sum(0).clamp(min=torch.finfo(size.dtype).tiny)
        weights = weights + step * direction
        residual = residual - step * image
        size, before = residual.square().sum(0), size
        direction = residual + size / before.clamp(min=torch.finfo(size.dtype).tiny) * direction
    return weights
