"""The data of the temperature study, and how accuracy, diversity, distance and cost are measured.

The model reads true text once. Every setting then draws R chunks at each of P positions:

    accuracy  = share of draws whose first n tokens are the text's, geometric mean over n = 1 .. 4
    collision = share of pairs of draws whose first n tokens agree, likewise; low means diverse
    distance  = sum_x (Q(x) - P_T(x))^2 over whole chunks, from agreements within and between draws

All three are unbiased before the geometric mean. Source: paper, figures 10 and 11, for the first
two.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm.decoding.engine.predictors import Predictor
from calm.decoding.generation import make_predictor
from calm.errors import UserError
from calm.models.agreement import prefix_collisions, prefix_matches
from calm.models.continuous import ContinuousTransformer

__all__ = [
    "Difference",
    "Outcomes",
    "Positions",
    "Result",
    "Setting",
    "Study",
    "StudyOptions",
    "difference",
    "draw_outcomes",
    "geometric_mean",
    "interval",
    "milliseconds",
    "squared_distance",
    "take_positions",
]

SEQUENCES_AT_A_TIME = 64  # that draw together
BLOCKS_AT_A_TIME = 16  # that the model reads together
MIN_CONTEXT = 4  # chunks before a position
TIMED_POSITIONS, TIMED_RUNS = 16, 3
RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Setting:
    """A way to choose chunks; fields as the arguments of `generate`."""

    method: str
    temperature: float = 1.0
    num_samples: int = 1
    noise_scale: float = 1.0

    def build(self, model: ContinuousTransformer, max_draws: int) -> Predictor:
        """What chooses chunks of `model` so."""
        return make_predictor(
            model,
            method=self.method,
            temperature=self.temperature,
            num_samples=self.num_samples,
            noise_scale=self.noise_scale,
            max_draws=max_draws,
        )


@dataclass(frozen=True)
class StudyOptions:
    """How much is measured.

    Attributes:
        temperatures: below 1, for every method that takes one.
        candidates: N of the vote.
        medoids: N of the medoid.
        noise_temperatures: of single draws with less noise, besides `temperatures`.
        repeats: R, chunks drawn at each position, at least 2.
        max_draws: cap of the exact method for one chunk.
        seed: of all draws.
    """

    temperatures: tuple[float, ...] = (0.8, 2 / 3, 0.5, 1 / 3)
    candidates: tuple[int, ...] = (10, 50, 200)
    medoids: tuple[int, ...] = (4, 8, 32, 200)
    noise_temperatures: tuple[float, ...] = (0.9, 0.2, 0.1)
    repeats: int = 6
    max_draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise UserError(f"repeats must be at least 2, got {self.repeats}")


@dataclass(frozen=True)
class Result:
    """What was measured of one setting; shares lie in [0, 1].

    Attributes:
        setting: which one.
        accuracy: share of draws that are the text, geometric mean over n.
        accuracy_interval: 95 %, bootstrap over positions.
        collision: share of pairs of draws that agree, likewise.
        collision_interval: likewise.
        distances: squared, to the exact distribution at each temperature: (temperature, distance,
            its standard error), over positions where no exact draw reached its cap.
        draws: of the head for one chunk, mean.
        fallbacks: share of chunks that a stated fallback decided.
        milliseconds: to choose a chunk of one sequence.
        against_vote: of a method that takes one draw, its differences from the vote among most
            candidates at the same temperature, at the same positions.
    """

    setting: Setting
    accuracy: float
    accuracy_interval: tuple[float, float]
    collision: float
    collision_interval: tuple[float, float]
    distances: list[tuple[float, float, float]]
    draws: float
    fallbacks: float
    milliseconds: float
    against_vote: "Difference | None" = None


@dataclass(frozen=True)
class Difference:
    """Of two settings at the same positions: of shares, with 95 % bootstrap intervals."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    collision: float
    collision_interval: tuple[float, float]


@dataclass(frozen=True)
class Study:
    """All results, and what they were measured on."""

    measured_on: dict[str, Any]
    results: list[Result]


@dataclass(frozen=True)
class Positions:
    """Positions in a text: the states ``[P, H]`` before them, and the true chunks ``[P, K]``."""

    hidden: Tensor
    chunks: Tensor

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True)
class Outcomes:
    """R chunks at each of P positions.

    Attributes:
        tokens: ``[R, P, K]``.
        draws: draws of the head that each chunk took, ``[R, P]``.
        is_fallback: whether a stated fallback decided, bool ``[R, P]``.
    """

    tokens: Tensor
    draws: Tensor
    is_fallback: Tensor

    def matches(self, chunks: Tensor) -> Tensor:
        """Share of the R whose first n tokens are those of `chunks`, ``[P, min(K, 4)]``."""
        return prefix_matches(self.tokens, chunks).mean(0)

    def collisions(self) -> Tensor:
        """Share of pairs of the R whose first n tokens agree, ``[P, min(K, 4)]``."""
        return prefix_collisions(self.tokens)


@torch.no_grad()
def take_positions(
    model: ContinuousTransformer, blocks: Iterable[Mapping[str, Any]], count: int, seed: int
) -> Positions:
    """`count` random positions of a text; runs of one repeated token and padding are skipped.

    Args:
        model: a CALM.
        blocks: of `calm.data.packing`: ``input_ids`` and ``labels`` ``[T]``.
        count: P at most.
        seed: of the choice of positions.

    Raises:
        UserError: the text holds no position with enough context.
    """
    size = model.patch_size
    rows = [(torch.as_tensor(block["input_ids"]), torch.as_tensor(block["labels"]))
            for block in blocks]  # fmt: skip
    hidden, chunks = [], []
    for begin in range(0, len(rows), BLOCKS_AT_A_TIME):
        ids, labels = map(torch.stack, zip(*rows[begin : begin + BLOCKS_AT_A_TIME], strict=True))
        targets = labels.to(model.device).unflatten(1, (-1, size))[:, MIN_CONTEXT:]  # [B, S, K]
        states = model(ids.to(model.device)).last_hidden_state
        states = states[:, -targets.shape[1] - 1 : -1]  # the state before each target
        counts = (targets >= 0).all(-1) & (targets != targets[..., :1]).any(-1)
        hidden.append(states[counts])
        chunks.append(targets[counts])
    if not sum(map(len, chunks)):
        raise UserError(f"the text holds no chunk with {MIN_CONTEXT} others before it; pass more")
    every = torch.cat(chunks)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(every), generator=generator)[:count].to(every.device)
    return Positions(torch.cat(hidden)[chosen], every[chosen])


@torch.no_grad()
def draw_outcomes(predictor: Predictor, positions: Positions, repeats: int, seed: int) -> Outcomes:
    """R = `repeats` independent chunks at each position; another `seed` draws others.

    Raises:
        UserError: latents or logits are not finite.
    """
    hidden = positions.hidden.repeat(repeats, 1)  # [R*P, H]
    rows = torch.arange(len(hidden), device=hidden.device)
    seeds = torch.stack([(seed << 32) + rows, torch.zeros_like(rows)], dim=1)
    parts = [
        predictor.choose(some, some_seeds)
        for some, some_seeds in zip(
            hidden.split(SEQUENCES_AT_A_TIME), seeds.split(SEQUENCES_AT_A_TIME), strict=True
        )
    ]
    if not all(bool(part.is_finite.all()) for part in parts):
        raise UserError("the model drew what is not finite; load an earlier checkpoint")
    shape = (repeats, len(positions))
    return Outcomes(
        tokens=torch.cat([part.tokens for part in parts]).unflatten(0, shape),
        draws=torch.cat([part.draws for part in parts]).unflatten(0, shape),
        is_fallback=torch.cat([part.is_fallback for part in parts]).unflatten(0, shape),
    )


def squared_distance(ours: Outcomes, exact: Outcomes, counts: Tensor) -> tuple[float, float]:
    """Squared distance of two distributions of whole chunks, mean over positions, and its standard
    error.

    sum_x (Q - P)^2 = (pairs within Q that agree) - 2 (pairs between) + (pairs within P)

    Args:
        ours: draws from Q.
        exact: independent draws from P.
        counts: positions that count, bool ``[P]``; NaN without any.
    """
    between = (ours.tokens[:, None] == exact.tokens).all(-1).to(torch.float64).mean((0, 1))  # [P]
    within = [_whole_collisions(outcomes.tokens) for outcomes in (ours, exact)]
    terms = (within[0] - 2 * between + within[1])[counts]
    if not len(terms):
        return float("nan"), float("nan")
    return float(terms.mean()), float(terms.std(correction=0) / len(terms) ** 0.5)


def _whole_collisions(tokens: Tensor) -> Tensor:
    """Share of pairs of ``[R, P, K]`` that agree in all K tokens, ``[P]``."""
    count = len(tokens)
    same = (tokens[:, None] == tokens).all(-1).to(torch.float64).sum((0, 1))
    return (same - count) / (count * (count - 1))


def geometric_mean(shares: Tensor) -> Tensor:
    """Over the last axis; 0 where a share is not positive."""
    return shares.clamp(min=0).log().mean(-1).exp()


def interval(shares: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval, over positions, of the geometric mean of means; ``[P, orders]``."""
    return _middle(_resampled(shares, seed))


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Difference:
    """Ours - theirs, of matches and collisions, ``[P, orders]`` each, at the same P positions."""
    accuracy, collision = (
        float(geometric_mean(mine.mean(0)) - geometric_mean(other.mean(0)))
        for mine, other in zip(ours, theirs, strict=True)
    )
    intervals = [
        _middle(_resampled(mine) - _resampled(other))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return Difference(accuracy, intervals[0], collision, intervals[1])


def _resampled(shares: Tensor, seed: int = 0) -> Tensor:
    """Geometric means of means of resampled positions; the same positions for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(shares), (RESAMPLES, len(shares)), generator=generator)
    return geometric_mean(shares.cpu().to(torch.float64)[chosen].mean(1))


def _middle(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of `values`."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@torch.no_grad()
def milliseconds(predictor: Predictor, positions: Positions) -> float:
    """Mean over positions of the time it takes to choose the chunk of one sequence.

    The backbone is not timed. Of `TIMED_RUNS` runs with the same draws the fastest counts.
    """
    times = []
    for index in range(min(TIMED_POSITIONS, len(positions))):
        hidden = positions.hidden[index : index + 1]
        seed = torch.tensor([[index, 0]], device=hidden.device)
        tries = []
        for _ in range(TIMED_RUNS):
            begin = time.perf_counter()
            predictor.choose(hidden, seed).tokens.tolist()
            tries.append(1e3 * (time.perf_counter() - begin))
        times.append(min(tries))
    return sum(times) / len(times)
