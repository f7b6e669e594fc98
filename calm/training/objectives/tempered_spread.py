"""The last step of `calm distill-temperature`: how far the noise of the new head is spread at T.

The energy score compares latents, and a head of finite size that learned by it draws more different
chunks than the vote it learned from. A factor s(T) on what its noise contributes is free when it
draws. Here s(T) is chosen so that draws agree as often as winners of two votes do,

    Σ_n log C_n(head, T, s) = Σ_n log C_n(vote, T),    C_n = E Σ_x P(first n tokens = x)², n = 1..4

on the training text. Both sides are unbiased before the logarithm: C_n of the vote comes from the
chances of two independent sets of N candidates, which hold for all T at once.

Shapes: P positions, N candidates, R draws, K tokens of a chunk.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from calm.decoding.sampling.chunk_distribution import HeadDistribution, decode
from calm.decoding.sampling.seeds import row_seeds
from calm.errors import UserError
from calm.labels import IGNORE_INDEX
from calm.models import EnergyTransformer
from calm.models.agreement import MAX_ORDER, prefix_collisions, prefix_matches
from calm.training.objectives.tempering import DRAWS_AT_A_TIME, TemperatureObjective
from calm.training.sharding.weights import is_sharded
from calm.training.trainer import CALMTrainer
from calm_kernels.agreeing_patch import vote_chances
from calm_kernels.noise import Stream, as_seed

__all__ = ["matched_spread", "set_tempered_spread", "vote_collisions"]

logger = logging.getLogger(__name__)

POSITIONS = 512  # of the training text, or all that an epoch has
DRAWS = 16  # of the tempered head at each
KNOTS = 4  # temperatures, evenly on a logarithmic scale
LEAST_SPREAD = 0.01
HALVINGS = 10  # of the interval that holds s, on a logarithmic scale: to 0.5 %


@torch.no_grad()
def set_tempered_spread(trainer: CALMTrainer) -> None:
    """Give the model of a finished run its ``tempered_spread``, if its arguments ask for one.

    A finished run that is started again gets the same factors again; so do all processes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    objective = getattr(model, "objective", None)
    if not isinstance(objective, TemperatureObjective) or not objective.arguments.match_agreement:
        return
    model.eval()
    with trainer.accelerator.autocast() if is_sharded(model) else nullcontext():
        hidden = _hidden_states(trainer, model)
    least, largest = objective.arguments.bounds
    count = KNOTS if least < largest else 1
    steps = [index / max(1, count - 1) for index in range(count)]
    temperatures = [least * (largest / least) ** step for step in steps]
    seed = trainer.args.seed
    votes = vote_collisions(model, hidden, temperatures, objective.arguments.max_draws, seed)
    if not (votes > 0).all():
        logger.warning(
            "no two votes of %d positions agree: tempered_spread stays 1 everywhere", len(hidden)
        )
        return
    model.config.tempered_spread = [
        [temperature, matched_spread(model, hidden, temperature, agreement, seed)]
        for temperature, agreement in zip(temperatures, _agreement(votes), strict=True)
    ]


def vote_collisions(
    model: EnergyTransformer,
    hidden: Tensor,
    temperatures: Sequence[float],
    num_candidates: int,
    seed: int,
) -> Tensor:
    """C_n of the vote at each of `temperatures`, float64 ``[temperatures, n]``.

    Args:
        model: a CALM; its own head makes the candidates.
        hidden: ``[P, H]``.
        temperatures: T in (0, 1].
        num_candidates: N.
        seed: of the candidates.

    Cost: 2 N draws a position, for all T together.
    """
    size = max(1, DRAWS_AT_A_TIME // (2 * num_candidates))
    orders = min(model.patch_size, MAX_ORDER)
    sums = torch.zeros(len(temperatures), orders, dtype=torch.float64, device=hidden.device)
    for begin in range(0, len(hidden), size):
        rows = hidden[begin : begin + size]
        own = HeadDistribution(model.generative_head, model.ae_model.decoder, rows)
        seeds = _seeds(seed, begin, rows)
        chunks = decode(own, own.latents(2 * num_candidates, seeds)).transpose(0, 1)  # [P, 2N, K]
        ours, theirs = chunks.split(num_candidates, dim=1)
        same = prefix_matches(ours[:, :, None], theirs[:, None]).to(torch.float64)  # [P, N, N, n]
        for index, temperature in enumerate(temperatures):
            chances = (vote_chances(part, 1 / temperature) for part in (ours, theirs))
            sums[index] += torch.einsum("pi,pj,pijn->n", *chances, same)
    return sums / len(hidden)


def matched_spread(
    model: EnergyTransformer, hidden: Tensor, temperature: float, agreement: float, seed: int
) -> float:
    """The factor s in [`LEAST_SPREAD`, 1] at which draws have this `agreement`.

    It is 1 where they agree as often already, and the least one where none lets them.

    Args:
        model: a CALM with a tempered head.
        hidden: ``[P, H]``.
        temperature: T, within the head's range.
        agreement: Σ_n log C_n to reach.
        seed: of the draws, the same for all s.
    """
    head = model.head_at(temperature)
    condition, seeds = head.condition(hidden, temperature), _seeds(seed, 0, hidden)

    def found(spread: float) -> float:
        own = HeadDistribution(head, model.ae_model.decoder, condition, spread)
        tokens = decode(own, own.latents(DRAWS, seeds))  # [R, P, K]
        return _agreement(prefix_collisions(tokens).mean(0))

    low, high = math.log(LEAST_SPREAD), 0.0
    if found(1.0) >= agreement:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if found(math.exp(middle)) >= agreement:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _agreement(collisions: Tensor) -> Any:
    """Σ_n log C_n, a number, or a list of one for each row of C_n."""
    return collisions.to(torch.float64).log().sum(-1).tolist()


def _hidden_states(trainer: CALMTrainer, model: EnergyTransformer) -> Tensor:
    """Of positions of the training text before whole chunks, in its order, ``[P, H]``."""
    found: list[Tensor] = []
    for batch in trainer.get_train_dataloader():
        labels = batch["labels"].unflatten(1, (-1, model.patch_size))[:, 1:]
        hidden = model(batch["input_ids"]).last_hidden_state[:, : labels.shape[1]]
        is_whole = (labels != IGNORE_INDEX).all(-1)
        states, counts = trainer.accelerator.gather((hidden, is_whole))
        found.append(states[counts])
        if sum(map(len, found)) >= POSITIONS:
            break
    if not sum(map(len, found)):
        raise UserError(
            "match_agreement must be False here: the training text has no whole chunk to measure on"
        )
    return torch.cat(found)[:POSITIONS]


def _seeds(seed: int, first: int, rows: Tensor) -> Tensor:
    """Of the draws at each of `rows`, int64 ``[P, 2]``."""
    index = torch.arange(first, first + len(rows), device=rows.device)
    return row_seeds(as_seed(seed, rows.device), index, Stream.VOTE)
