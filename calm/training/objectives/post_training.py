r"""Reinforcement learning of a CALM's draws, without a likelihood of theirs.

The old model is the head as it was, a frozen copy. At each position it draws z_1 .. z_m, which the
frozen autoencoder decodes to chunks, and the chunks get rewards r_1 .. r_m. The backbone stays as
it is. Two methods:

**Tilted.** The head draws x_1 .. x_n and learns with the energy score against the weighted z_j,

    loss = 2/n Σ_j w_j Σ_i |x_i - z_j|^α - 1/(n(n-1)) Σ_{i≠k} |x_i - x_k|^α

With w = softmax(r/β) its mean is least, as m grows, at p_old(z) exp(r(z)/β) / Z; at finite m the
optimum lies between that and p_old. With w_j = (1 + η A_j)/m, A = r - mean r, the weights may be
negative: a direction for the head, bounded because they sum to 1, but no distribution to reach.

**Policy.** The head stays too; a density of its noise learns (`calm.models.heads.steered`) by

    gradient of E r = E (1/m) Σ_j A_j ∇ log π(ε_j | h),    A_j = r_j - baseline of the other draws

of its own m draws. The log-density is known, so this is unbiased for any m and any reward.

Advantages are never divided by the deviation of their group: that would change what is maximised.
Both methods log how far the new draws are from the old ones, D = 2E|x-z| - E|x-x'| - E|z-z'|.

Shapes: B sequences, S positions, R = B S, K tokens of a chunk, L latent size, H hidden size.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance
from calm.errors import UserError
from calm.models.heads.base import HeadLoss, is_recomputed
from calm.models.objective import PredictedChunks
from calm.training.flags.parser import flag
from calm.training.monitoring.clock import RunLimit
from calm.training.objectives.rewards import READS, Group, Reward
from calm_kernels.energy_score import energy_score

__all__ = [
    "EnergyDistanceLimit", "PolicyObjective", "PostTrainingArguments", "PostTrainingObjective",
    "TiltedObjective", "energy_distance", "limits", "target_weights",
]  # fmt: skip

logger = logging.getLogger(__name__)

DRAWS_AT_A_TIME = 2**13  # decoded together
METHODS, WEIGHTINGS = ("tilted", "policy"), ("softmax", "signed")
UNUSED = {  # flags without effect
    "policy": ("weighting", "reward_temperature", "advantage_scale"),
    "softmax": ("advantage_scale",),
    "signed": ("reward_temperature",),
}
DISTANCE = "energy_distance"


@dataclass
class PostTrainingArguments:
    """Which reward is raised, how, and how far from the old model."""

    _argument_group_name = "post-training"

    method: str = flag("tilted", "tilted: the head learns; policy: a density of its noise.")
    reward: str = flag("brier", "brier, length, repetition, regex:PATTERN or module:function.")
    reward_reads: str = flag("text", "What a module:function gets: text, or tokens as ids.")
    reward_context: int = flag(64, "Tokens before a chunk that a reward sees.")
    num_draws: int = flag(32, "m, draws of a position that get rewards.")
    weighting: str = flag("softmax", "Weights of tilted draws: softmax (of r/beta) or signed.")
    reward_temperature: float = flag(1.0, "beta of the softmax: less of it tilts more.")
    advantage_scale: float = flag(1.0, "eta of signed weights, (1 + eta A)/m.")
    old_weight: float = flag(0.0, "Weight of an energy score against the old model's draws.")
    max_energy_distance: float = flag(
        0.0, "Stop once the mean distance since the last log exceeds this. 0: no limit."
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS), ("weighting", WEIGHTINGS), ("reward_reads", READS)
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        is_policy = self.method == "policy"
        chosen = f"method={self.method}" if is_policy else f"weighting={self.weighting}"
        unused = UNUSED[self.method if is_policy else self.weighting]
        for option in fields(self):
            given = getattr(self, option.name)
            if option.name in unused and given != option.default:
                raise UserError(
                    f"{option.name} has no effect with {chosen}: take it out, got {given!r}"
                )


def target_weights(rewards: Tensor, arguments: PostTrainingArguments) -> Tensor:
    """Weights of the old model's draws, ``[m, R]`` like their rewards; they sum to 1."""
    if arguments.weighting == "softmax":
        return (rewards / arguments.reward_temperature).softmax(0)
    return (1 + arguments.advantage_scale * (rewards - rewards.mean(0))) / len(rewards)


@torch.no_grad()
def energy_distance(new: Tensor, old: Tensor, exponent: float = 1.0) -> Tensor:
    """Unbiased D = 2E|x-z|^α - E|x-x'|^α - E|z-z'|^α, which is 0 for equal distributions.

    Args:
        new: independent draws x, ``[n, R, L]``, n >= 2.
        old: independent draws z, ``[m, R, L]``, m >= 2, independent of x.
        exponent: α.

    Returns: ``[R]``; a single estimate may lie below 0. Cost: (n + m)² distances a position, no
        array of them.
    """
    first = old[:1]
    to_first = torch.linalg.vector_norm(old - first, dim=-1).pow(exponent).mean(0)
    spread = energy_score(old, first, exponent=exponent) + 2 * to_first  # mean over pairs of draws
    return -energy_score(new, old, exponent=exponent) - spread


class _Learned(NamedTuple):
    """What a method learns by.

    Attributes:
        loss: of each position ``[R]``, 0 for a masked one.
        samples: new draws ``[n, R, L]``.
        value: the reward's of them, ``[R]``, 0 for a masked position.
        measured: what the method alone has logged, likewise.
    """

    loss: Tensor
    samples: Tensor
    value: Tensor
    measured: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class PostTrainingObjective:
    """What the two methods share, as a `calm.models.objective.Objective`.

    Attributes:
        arguments: the flags.
        reward: of chunks.
        old_head: the head as it was.
    """

    arguments: PostTrainingArguments
    reward: Reward
    old_head: Any
    measures: ClassVar[tuple[str, ...]] = ("reward", "old_reward", DISTANCE)

    def loss(self, chunks: PredictedChunks, *, seed: Tensor, first_row: int | Tensor) -> HeadLoss:
        """See `Objective`. Measured: rewards of new and old draws, their distance; 1/Σw²."""
        position = _Positions(self, chunks)
        old = self._old_draws(position.rows, seed, first_row)
        group = position.group(old)
        rewards = self.reward.rewards(group)
        learned = self._learn(position, old, rewards, seed, first_row)
        distance = energy_distance(learned.samples, old, position.exponent)
        measured = {
            "reward": learned.value,
            "old_reward": position.everywhere(self.reward.value(group, rewards)),
            DISTANCE: distance * position.weight,
            **learned.measured,
        }
        shape = chunks.weight.shape
        measured = {name: measure.view(shape) for name, measure in measured.items()}
        return HeadLoss(learned.loss.view(shape), measured=measured)

    def _learn(
        self,
        position: "_Positions",
        old: Tensor,
        rewards: Tensor,
        seed: Tensor,
        first_row: int | Tensor,
    ) -> _Learned:
        """What the method learns by.

        Args:
            position: the positions.
            old: the old model's draws, ``[m, R, L]``.
            rewards: of them, at each position that counts.
            seed: of the new model's draws.
            first_row: global index of the first position.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _old_draws(self, rows: Tensor, seed: Tensor, first_row: int | Tensor) -> Tensor:
        """``[m, R, L]``, independent of the new model's draws."""
        head = self.old_head.to(rows.device)
        return head.sample(
            rows, num_samples=self.arguments.num_draws, seed=advance(seed, OFFSET_STRIDE),
            first_row=first_row,
        )  # fmt: skip


@dataclass(frozen=True)
class TiltedObjective(PostTrainingObjective):
    """The head learns the old one's draws, weighted by their rewards."""

    measures = (*PostTrainingObjective.measures, "effective_draws")

    def _learn(
        self,
        position: "_Positions",
        old: Tensor,
        rewards: Tensor,
        seed: Tensor,
        first_row: int | Tensor,
    ) -> _Learned:
        head, config = position.model.generative_head, position.model.config
        samples = head.sample(
            position.rows, None, config.num_samples, seed, first_row,
            recompute=is_recomputed(head, config.head_recompute),
        )  # fmt: skip
        # The energy score is linear in its target: both together are one mixture.
        weights, share = target_weights(rewards, self.arguments), self.arguments.old_weight
        score = energy_score(
            samples, old, exponent=position.exponent, weight=position.weight,
            target_weights=(position.everywhere(weights) + share / len(old)) / (1 + share),
        )  # fmt: skip
        group = position.group(samples)
        value = position.everywhere(self.reward.value(group, self.reward.rewards(group)))
        effective = position.everywhere(1 / weights.square().sum(0))
        return _Learned(-score, samples, value, {"effective_draws": effective})


@dataclass(frozen=True)
class PolicyObjective(PostTrainingObjective):
    """The density of the noise learns; the value of the loss is minus that of the reward."""

    def _learn(
        self,
        position: "_Positions",
        old: Tensor,
        rewards: Tensor,
        seed: Tensor,
        first_row: int | Tensor,
    ) -> _Learned:
        head: Any = position.model.generative_head
        share = self.arguments.old_weight
        drawn = head.draw(position.rows, len(old), seed, first_row)
        with torch.set_grad_enabled(share > 0 and torch.is_grad_enabled()):
            noise = head.as_noise(drawn).to(position.rows.dtype)
            samples = head(position.rows, noise)
        group = position.group(samples)
        own = self.reward.rewards(group)
        value = position.everywhere(self.reward.value(group, own))
        advantages = position.everywhere(self.reward.advantages(group, own))
        gain = (advantages * head.log_density(drawn.detach(), position.rows)).mean(0)
        loss = gain.detach() - gain - value
        if share:
            loss = loss - share * energy_score(
                samples, old, exponent=position.exponent, weight=position.weight
            )
        return _Learned(loss, samples.detach(), value)


@dataclass(frozen=True)
class _Positions:
    """The positions of a micro-batch: what a reward needs to know of them."""

    objective: PostTrainingObjective
    chunks: PredictedChunks

    @property
    def model(self) -> Any:
        """The model that learns."""
        return self.chunks.model

    @property
    def exponent(self) -> float:
        """α of its energy score."""
        return float(self.model.config.beta)

    @cached_property
    def rows(self) -> Tensor:
        """Hidden states ``[R, H]``."""
        return self.chunks.hidden.flatten(0, 1)

    @property
    def weight(self) -> Tensor:
        """1 for a position that counts, ``[R]``."""
        return self.chunks.weight.flatten()

    @cached_property
    def counted(self) -> Tensor:
        """Which positions count, int64."""
        return self.weight.nonzero()[:, 0]

    def everywhere(self, values: Tensor) -> Tensor:
        """What is known where a position counts, ``[..., R]``, with 0 elsewhere."""
        shape = (*values.shape[:-1], len(self.rows))
        return values.new_zeros(shape).index_copy(-1, self.counted, values)

    def group(self, latents: Tensor) -> Group:
        """Draws ``[m, R, L]`` as chunks, where a position counts."""
        size = max(1, DRAWS_AT_A_TIME // len(latents))
        parts = latents.detach()[:, self.counted].split(size, dim=1)
        draws = torch.cat([self.model.decode_latents(part) for part in parts], dim=1)
        contexts = self._contexts if self.objective.reward.reads_contexts else ()
        return Group(draws, self.chunks.labels.flatten(0, 1)[self.counted], contexts)

    @cached_property
    def _contexts(self) -> list[list[int]]:
        """The last tokens before each chunk that counts, copied to the host once."""
        chunks, size = self.chunks.labels.shape[1:]
        texts, reach = self.chunks.input_ids.tolist(), self.objective.arguments.reward_context
        found = []
        for row in self.counted.tolist():
            end = (row % chunks + 1) * size
            found.append(texts[row // chunks][max(0, end - reach) : end])
        return found


class EnergyDistanceLimit(RunLimit):
    """Ends a run whose draws have gone too far from the old model's.

    Args:
        limit: of the mean distance since the last log.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._distance = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the last log was beyond the limit."""
        return self._distance > self.limit

    def resume(self, state: TrainerState) -> None:
        """A run that has ended here takes no further step when it is started again."""
        logged = [entry[DISTANCE] for entry in state.log_history if DISTANCE in entry]
        self._distance = logged[-1] if logged else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a run without a log, in which nothing would be compared with the limit."""
        strategy, given = args.logging_strategy, ""
        if strategy == IntervalStrategy.NO:
            given = "logging_strategy=no"
        elif strategy == IntervalStrategy.STEPS and state.logging_steps > state.max_steps:
            given = f"logging_steps={state.logging_steps} in a run of {state.max_steps} steps"
        if given and not args.logging_first_step:
            raise UserError(
                f"max_energy_distance={self.limit:g} is compared with the distance at each log, "
                f"and this run has none; got {given}"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop with an evaluation and a checkpoint, and say why."""
        self._distance = (logs or {}).get(DISTANCE, self._distance)
        if self.is_over and not control.should_training_stop:
            logger.warning(
                "stopping after step %d: the energy distance from the old model, %.4g, exceeds "
                "max_energy_distance=%g",
                state.global_step, self._distance, self.limit,
            )  # fmt: skip
            self.end_run(args, control)


def limits(arguments: PostTrainingArguments) -> list[RunLimit]:
    """What ends a run early."""
    limit = arguments.max_energy_distance
    return [EnergyDistanceLimit(limit)] if limit else []
