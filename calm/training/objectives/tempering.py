"""Learning a temperature: a second energy head draws in one step what a vote chooses among many.

At each position the model's own head, which stays as it is, makes N draws z_i, and the vote of
Algorithm 2 gives each the chance w_i(T) that it wins (`vote_distribution`). The tempered head draws
x_1 .. x_n for this T and learns with the energy score against the mixture of the z_i,

    loss = 2/n Σ_j Σ_i w_i |x_j - z_i|^α - 1/(n(n-1)) Σ_{j≠k} |x_j - x_k|^α

whose mean over draws is least where x has the distribution of the vote's winner. Draws of a chunk
other than the winner's have weight 0: nothing here says which latent stands for a chunk, the head
itself does, and what is left is exactly its own distribution, reweighted. T is drawn for each
position, 1/T uniform on a logarithmic scale, and N for each step, likewise.

Shapes: B sequences, S positions, N draws of the vote, n of the tempered head, L latent size, H
hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.decoding.sampling.chunk_distribution import HeadDistribution
from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance
from calm.decoding.sampling.voting import vote_distribution
from calm.errors import UserError
from calm.models import EnergyTransformer
from calm.models.heads.base import HeadLoss, is_recomputed
from calm.models.objective import PredictedChunks
from calm.training.flags.parser import flag
from calm_kernels.energy_score import energy_score
from calm_kernels.noise import Stream
from calm_kernels.uniform_draws import uniform_draws

__all__ = ["TemperatureObjective", "TemperingArguments"]

DRAWS_AT_A_TIME = 2**13  # of a vote, decoded together: half a gigabyte at the published sizes


@dataclass
class TemperingArguments:
    """Which temperatures are learned, from which votes."""

    _argument_group_name = "temperature"

    min_temperature: float = flag(0.3, "Least T that the head learns, in (0, 1).")
    max_temperature: float = flag(0.8, "Largest T, likewise.")
    min_draws: int = flag(200, "Least N, candidates of a vote.")
    max_draws: int = flag(200, "Largest N; each step draws its own, uniform in log N.")
    match_agreement: bool = flag(
        True,
        "After training, narrow what the head's noise contributes at each T until its draws agree "
        "as often as winners of votes; False leaves the head as it was trained.",
    )

    def __post_init__(self) -> None:
        low, high = self.min_temperature, self.max_temperature
        if not 0 < low <= high < 1:
            raise UserError(
                "min_temperature and max_temperature must be 0 < min <= max < 1 (T = 1 is the "
                f"model as it is), got {low} and {high}"
            )
        least = 1 / low
        if not least <= self.min_draws <= self.max_draws:
            raise UserError(
                f"min_draws must lie between 1/min_temperature, {least:.4g} draws that have to "
                f"agree, and max_draws; got {self.min_draws} and {self.max_draws}"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest T."""
        return self.min_temperature, self.max_temperature


@dataclass(frozen=True)
class TemperatureObjective:
    """The loss of the tempered head, as a `calm.models.objective.Objective`.

    Attributes:
        arguments: temperatures and numbers of draws.
    """

    arguments: TemperingArguments

    def loss(self, chunks: PredictedChunks, *, seed: Tensor, first_row: int | Tensor) -> HeadLoss:
        """See `Objective`; of the text it needs only which chunks count."""
        model, rows, weight = chunks.model, chunks.hidden.flatten(0, 1), chunks.weight
        config = model.config
        power = self._powers(len(rows), seed, first_row)
        targets, chances = self._targets(model, rows, power, seed, first_row)
        head: Any = model.tempered_head
        samples = head.sample(
            head.condition(rows, 1 / power), None, config.num_samples, seed, first_row,
            recompute=is_recomputed(head, config.head_recompute),
        )  # fmt: skip
        score = energy_score(
            samples, targets, exponent=float(config.beta), target_weights=chances,
            weight=weight.flatten(),
        )  # fmt: skip
        return HeadLoss(-score.unflatten(0, weight.shape))

    def _powers(self, num_rows: int, seed: Tensor, first_row: int | Tensor) -> Tensor:
        """1/T of each position, ``[B*S]``."""
        least, largest = self.arguments.bounds
        drawn = uniform_draws(
            num_rows, 1, stream=Stream.VOTE, seed=seed, first_row=first_row, device=seed.device
        )[:, 0]
        return (1 / largest) * (largest / least) ** drawn

    def _num_draws(self, seed: Tensor) -> int:
        """N of the step."""
        least, largest = self.arguments.min_draws, self.arguments.max_draws
        if least == largest:
            return least
        own = advance(seed, OFFSET_STRIDE)
        drawn = uniform_draws(1, 1, stream=Stream.VOTE, seed=own, device=seed.device)
        return round(least * (largest / least) ** float(drawn))

    @torch.no_grad()
    def _targets(
        self,
        model: EnergyTransformer,
        hidden: Tensor,
        power: Tensor,
        seed: Tensor,
        first_row: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Draws of the model's own head, ``[N, B*S, L]``, and their chances ``[N, B*S]``."""
        count, own = self._num_draws(seed), advance(seed, OFFSET_STRIDE)
        size = max(1, DRAWS_AT_A_TIME // count)
        drawn, chances = [], []
        for begin in range(0, len(hidden), size):
            rows = slice(begin, begin + size)
            latents = model.generative_head.sample(
                hidden[rows], num_samples=count, seed=own, first_row=first_row + begin
            )
            distribution = HeadDistribution(
                model.generative_head, model.ae_model.decoder, hidden[rows]
            )
            chances.append(vote_distribution(distribution, latents, power[rows]))
            drawn.append(latents)
        return torch.cat(drawn, dim=1), torch.cat(chances, dim=1)
