"""Energy score of a CALM on a text, from fixed draws, beside the scores that put it into place.

All are losses, the lower the better, with exponent 1 whatever the model trained with:

    energy          2 E|x - y| - E|x - x'|, x drawn by the head, y from the posterior of the chunk
    floor           E|y - y'|: what a head scores that draws from the posterior itself
    other context   the energy score of draws for the hidden state of another position
    unconditional   that of latents of other positions: what a head can reach without context

Energy lies between the floor and the unconditional score; other context minus energy says how much
the head listens to its context. Source: the energy score and its floor, CALM section 3.2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.models import ContinuousTransformer
from calm.models.heads.base import Posterior
from calm_kernels.energy_score import gaussian_energy_score
from calm_kernels.noise import Stream, as_seed, normal, uniform

__all__ = ["ENERGY_TERMS", "energy_sums"]

ENERGY_TERMS = ("energy", "fidelity", "diversity", "floor", "other_context", "unconditional")
SHIFT = 7  # chunks to the hidden state of another position


def energy_sums(
    model: ContinuousTransformer,
    blocks: Any,
    *,
    num_samples: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Sums of `ENERGY_TERMS` over the chunks of blocks, ``[blocks, 6]``, and counts ``[blocks]``.

    Two models with one autoencoder are scored with the same draws.

    Args:
        model: a CALM with any head.
        blocks: packed ones (`calm.evaluation.text.scored_blocks`), at least 16 chunks long.
        num_samples: N >= 2 draws a chunk.
        seed: of the draws.
        batch_size: blocks that are read together; the unconditional score takes its latents from
            them, the other terms change by rounding alone.

    Cost: a forward pass and 2 N draws of each chunk.
    """
    if num_samples < 2:
        raise UserError(f"num_samples must be at least 2, got {num_samples}")
    rows = [(torch.as_tensor(block["input_ids"]), torch.as_tensor(block["labels"]))
            for block in blocks]  # fmt: skip
    sums, counts = [], []
    address, first_row = as_seed(seed, model.device), 0
    with evaluating(model):
        for begin in range(0, len(rows), batch_size):
            ids, labels = map(torch.stack, zip(*rows[begin : begin + batch_size], strict=True))
            hidden, posterior = model.predicted(ids.to(model.device), labels.to(model.device))
            draws = {"seed": address, "first_row": first_row}
            sums.append(_terms(model, hidden, posterior, num_samples, draws).sum(1).cpu())
            counts.append(posterior.weight.sum(1).cpu())
            first_row += hidden.shape[0] * hidden.shape[1]
    if not sums:
        raise UserError("there are no blocks to evaluate; use more text or a smaller block size")
    return torch.cat(sums).double(), torch.cat(counts).double()


def _terms(
    model: ContinuousTransformer,
    hidden: Tensor,
    posterior: Posterior,
    num_samples: int,
    draws: Mapping[str, Any],
) -> Tensor:
    """`ENERGY_TERMS` of each chunk, 0 where it does not count, ``[B, S, 6]``."""
    sample = model.generative_head.sample
    drawn = sample(hidden, num_samples=num_samples, **draws)
    elsewhere = sample(hidden.roll(SHIFT, dims=1), num_samples=num_samples, **draws)
    score, parts = _score(drawn, posterior, return_diagnostics=True)
    terms = (
        -score,
        parts.fidelity,
        parts.diversity,
        _floor(posterior),
        -_score(elsewhere, posterior),
        -_score(_other_latents(posterior, num_samples, **draws), posterior),
    )
    return torch.stack([term.float() for term in terms], dim=-1)


def _score(samples: Tensor, posterior: Posterior, **options: Any) -> Any:
    mean, log_std, weight = posterior
    return gaussian_energy_score(samples.float(), mean, log_std, weight=weight, **options)


def _floor(posterior: Posterior) -> Tensor:
    """E|y - y'|, with y - y' ~ N(0, 2 std²): half the score of two draws at the mean."""
    mean, log_std, weight = posterior
    at_mean = mean.expand(2, *mean.shape)
    wide = log_std + 0.5 * math.log(2.0)
    return -0.5 * gaussian_energy_score(at_mean, mean, wide, weight=weight)


def _other_latents(posterior: Posterior, num_samples: int, seed: Tensor, first_row: int) -> Tensor:
    """Latents of random chunks that count, ``[N, B, S, L]``."""
    mean, log_std, weight = posterior
    counted = weight.flatten() > 0
    means, stds = mean.flatten(0, 1)[counted], log_std.flatten(0, 1)[counted].exp()
    count, width = weight.numel(), mean.shape[-1]
    options: Any = {"seed": seed, "num_draws": num_samples, "first_row": first_row}
    place = uniform(count, 1, stream=Stream.TIMESTEP, device=mean.device, **options)
    index = (place.flatten() * len(means)).long().clamp(max=len(means) - 1)
    noise = normal(count, width, stream=Stream.PATH, device=mean.device, **options)
    latents = means[index] + stds[index] * noise.reshape(-1, width)
    return latents.view(num_samples, *mean.shape)
