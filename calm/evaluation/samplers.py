"""What BrierLM asks of a model: draws or probabilities of the next chunk.

`CALMSampler` is for models that can only be sampled, `ReadoutSampler` for readouts of a CALM's
hidden states, `TokenSampler` for the token-by-token baseline, which knows its probabilities and
whose chunk is one token. `calm.evaluation.brier` treats all alike. What a model reads and how large
its chunks are, its `Predictor` says.
"""

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.decoding.engine.predictors import (
    ChunkPredictor,
    Predictor,
    ReadoutPredictor,
    TokenPredictor,
)
from calm.decoding.generation import make_predictor
from calm.decoding.sampling.seeds import OFFSET_STRIDE, advance
from calm.decoding.sampling.token_draws import SlotReadout, draw_chunks
from calm.errors import UserError
from calm.evaluation.rollout import Step
from calm.models.agreement import MAX_ORDER, prefix_collisions, prefix_matches
from calm_kernels import uniform_draws
from calm_kernels.noise import Stream
from calm_kernels.softmax_draws import draw_tokens

__all__ = [
    "DRAWS_AT_A_TIME",
    "LOGITS_AT_A_TIME",
    "CALMSampler",
    "ChunkSampler",
    "DrawSampler",
    "ReadoutSampler",
    "TokenSampler",
    "make_sampler",
]

DRAWS_AT_A_TIME = 2**13  # latents decoded together: half a gigabyte at the published sizes
LOGITS_AT_A_TIME = 2**25  # logits of the baseline that are held together: 128 MB in float32


class ChunkSampler(Protocol):
    """Estimates what Brier-n needs of the next chunk."""

    @property
    def predictor(self) -> Predictor:
        """The model: its backbone, its chunk size K, its inputs."""

    @property
    def estimator(self) -> str:
        """How scores are estimated, in a few words for the protocol."""

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """The chunk after each hidden state ``[B, Q, H]``, compared with `target` ``[B, Q, K]``.

        `rows` (int64 ``[B, Q]``) and `depth` address the draws: equal addresses draw equal numbers.
        """


@dataclass(frozen=True)
class DrawSampler:
    """N draws of each chunk; a subclass says where they come from.

    Attributes:
        predictor: of a CALM.
        num_draws: N >= 2.
        is_published: chain the draws of neighbouring chunks one by one, as published, instead of
            their shares (lower variance).
        seed: int64 ``[2]``.
    """

    predictor: Predictor
    num_draws: int
    is_published: bool
    seed: Tensor

    @property
    def estimator(self) -> str:
        """See `ChunkSampler`."""
        return "two draws, as published" if self.is_published else "pairs among all draws"

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """Shares of N draws; a rollout continues with the first. See `ChunkSampler`."""
        draws = self.draws(hidden, target, rows, depth)  # [N, B, Q, K]
        matches = None
        if target is not None:
            matches = prefix_matches(draws, target)
            matches = matches if self.is_published else matches.mean(0, keepdim=True)
        agreement = (draws[1:] == draws[:1]).all(-1).to(torch.float32).mean(0)
        return Step(draws[0], agreement, prefix_collisions(draws), matches)

    def draws(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int = 0) -> Tensor:
        """Token ids ``[N, B, Q, K]``; with a target, those that no comparison needs may be -1.

        Arguments as `ChunkSampler.step`.
        """
        seed = advance(self.seed, rows.flatten() + depth * OFFSET_STRIDE)
        size = max(1, DRAWS_AT_A_TIME // self.num_draws)
        targets = [None] if target is None else target.flatten(0, 1).split(size)
        parts = [
            self._draw(*part)
            for part in zip_longest(hidden.flatten(0, 1).split(size), seed.split(size), targets)
        ]
        return torch.cat(parts, dim=1).unflatten(1, rows.shape)

    def _draw(self, hidden: Tensor, seed: Tensor, target: Tensor | None) -> Tensor:
        """Token ids ``[N, R, K]`` after hidden states ``[R, H]``, with a seed for each."""
        raise NotImplementedError


@dataclass(frozen=True)
class CALMSampler(DrawSampler):
    """Draws of a CALM's head.

    Attributes:
        noise_spread: factor on what the noise contributes, see `GenerativeHead.sample`.
    """

    predictor: ChunkPredictor
    noise_spread: float = 1.0

    def _draw(self, hidden: Tensor, seed: Tensor, target: Tensor | None) -> Tensor:
        """Token ids ``[N, R, K]``.

        With a target that holds a whole n-gram no rollout follows, and only the tokens that are
        compared are decoded.
        """
        model = self.predictor.model
        latents = model.distribution(hidden).latents(
            self.num_draws,
            seed,
            noise_scale=self.predictor.method.noise_scale,
            noise_spread=self.noise_spread,
        )
        if not torch.isfinite(latents).all():
            raise UserError(
                "the head drew latents that are not finite: the weights are damaged or training "
                "diverged; load an earlier checkpoint"
            )
        if target is None or self.predictor.patch_size < MAX_ORDER:
            return model.decode_latents(latents)
        return model.decode_compared(latents, target)


@dataclass(frozen=True)
class ReadoutSampler(DrawSampler):
    """Draws of a readout: of each slot on its own, or one slot after the other.

    Attributes:
        readout: of states of the predictor's model.
    """

    readout: SlotReadout

    def _draw(self, hidden: Tensor, seed: Tensor, target: Tensor | None) -> Tensor:
        """Token ids ``[N, R, K]``; logits of a few rows at a time."""
        size = max(1, LOGITS_AT_A_TIME // (self.num_draws * self.readout.vocab_size))
        parts = [
            draw_chunks(self.readout, *part, num_draws=self.num_draws)
            for part in zip(hidden.split(size), seed.split(size), strict=True)
        ]
        if not all(bool(is_finite.all()) for _, is_finite in parts):
            raise UserError(
                "the readout's logits are not finite: the weights are damaged or training "
                "diverged; load an earlier checkpoint"
            )
        return torch.cat([tokens for tokens, _ in parts], dim=1)


@dataclass(frozen=True)
class TokenSampler:
    """Exact probabilities of the next token; draws only decide how a rollout continues.

    Attributes:
        predictor: of the baseline.
        is_published: let a second draw decide whether a rollout's prefix collides, as published,
            instead of its exact probability.
        seed: int64 ``[2]``.
    """

    predictor: TokenPredictor
    is_published: bool
    seed: Tensor

    @property
    def estimator(self) -> str:
        """See `ChunkSampler`."""
        return "exact chances, two draws for prefixes" if self.is_published else "exact chances"

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """Probabilities under the softmax; logits of a few rows at a time. See `ChunkSampler`."""
        uniforms = uniform_draws(
            rows.numel(),
            2,
            stream=Stream.HEAD,
            seed=advance(self.seed, rows.flatten() + depth * OFFSET_STRIDE),
            device=hidden.device,
            dtype=torch.float64,
        )
        wanted = torch.zeros_like(rows) if target is None else target[..., 0].clamp(min=0)
        size = max(1, LOGITS_AT_A_TIME // self.predictor.model.config.vocab_size)
        parts = [
            self._probabilities(*part)
            for part in zip(
                hidden.flatten(0, 1).split(size),
                wanted.flatten().split(size),
                uniforms.split(size),
                strict=True,
            )
        ]
        token, agreement, collision, match = (
            torch.cat(values).view(rows.shape) for values in zip(*parts, strict=True)
        )
        return Step(token[..., None], agreement, collision[..., None], match[None, ..., None])

    def _probabilities(
        self, hidden: Tensor, wanted: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drawn token, probability of agreement, sum_x P(x)^2 and P(wanted), each ``[rows]``."""
        logits = self.predictor.model.lm_head(hidden)
        probabilities = logits.to(torch.float32).softmax(-1)  # [rows, V]
        drawn = draw_tokens(probabilities, uniforms)
        token = drawn[:, :1]
        if self.is_published:
            agreement = (drawn[:, 1:] == token).to(probabilities.dtype)
        else:
            agreement = probabilities.gather(1, token)
        match = probabilities.gather(1, wanted[:, None])
        return token[:, 0], agreement[:, 0], probabilities.square().sum(-1), match[:, 0]


def make_sampler(
    model: PreTrainedModel,
    *,
    num_samples: int,
    brier_draws: int | None,
    noise_scale: float,
    seed: Tensor,
    noise_spread: float = 1.0,
    method: str = "direct",
) -> ChunkSampler:
    """The sampler of a CALM or of the baseline; arguments as `calm.evaluation.score_text`."""
    num_draws = num_samples if brier_draws is None else brier_draws
    if not 2 <= num_draws <= num_samples:
        raise UserError(
            "num_samples must be at least 2, and brier_draws lie between 2 and num_samples; "
            f"got num_samples={num_samples}, brier_draws={brier_draws}"
        )
    is_published = brier_draws == 2
    predictor = make_predictor(model, method=method, temperature=1.0, noise_scale=noise_scale)
    if not (math.isfinite(noise_spread) and noise_spread >= 0):
        raise UserError(f"noise_spread must be finite and at least 0, got {noise_spread}")
    if isinstance(predictor, ChunkPredictor):
        return CALMSampler(predictor, num_draws, is_published, seed, noise_spread=noise_spread)
    if noise_spread != 1:
        what = "" if isinstance(predictor, TokenPredictor) else "the readout of "
        raise UserError(
            f"noise_spread must be 1 for {what}a {type(model).__name__}, which has no head whose "
            f"noise could be spread; got {noise_spread}"
        )
    if isinstance(predictor, TokenPredictor):
        return TokenSampler(predictor, is_published, seed)
    assert isinstance(predictor, ReadoutPredictor)  # there are three
    readout = predictor.model.slot_readout()
    return ReadoutSampler(predictor, num_draws, is_published, seed, readout)
