"""What BrierLM asks of a model: the input of its backbone, and what the next chunk may be.

One class for models that can only be sampled (CALM) and one for models that give probabilities
(the token-by-token baseline, whose chunk is one token); `calm.evaluation.brier` treats both alike.
"""

import math
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.decoding.sampling.seeds import advance
from calm.errors import UserError
from calm.evaluation.rollout import Step
from calm.models.agreement import MAX_ORDER, prefix_collisions, prefix_matches
from calm.models.baseline import BaselineTransformer
from calm.models.continuous import ContinuousTransformer
from calm_kernels import noise

__all__ = ["CALMSampler", "ChunkSampler", "TokenSampler", "make_sampler"]

DEPTH_STRIDE = 2**40  # rollout depths draw from disjoint ranges of the seed's offset
DRAWS_AT_A_TIME = 2**13  # latents decoded together: half a gigabyte at the published sizes
LOGITS_AT_A_TIME = 2**25  # logits of the baseline that are held together: 128 MB in float32


class ChunkSampler(Protocol):
    """See the module's docstring; K = `patch_size` tokens make a chunk."""

    @property
    def backbone(self) -> PreTrainedModel:
        """A decoder over ``inputs_embeds``."""

    @property
    def patch_size(self) -> int:
        """K."""

    @property
    def estimator(self) -> str:
        """How scores are estimated, in words."""

    def inputs(self, input_ids: Tensor) -> Tensor:
        """What the backbone reads to predict all chunks but the first of ``[B, P * K]``:
        ``[B, P - 1, H]``.
        """

    def embed(self, input_ids: Tensor) -> Tensor:
        """Inputs of the backbone, ``[B, P, H]``, for further token ids ``[B, P * K]``."""

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """The chunk after each state ``[B, Q, H]``, compared with `target` ``[B, Q, K]``.

        `rows` (int64 ``[B, Q]``) and `depth` address the draws: equal addresses draw equal numbers.
        """


class CALMSampler:
    """N draws of each chunk.

    Args:
        model: a CALM.
        num_draws: N >= 2.
        is_published: chain the draws of neighbouring chunks one by one, as published, instead of
            their shares (lower variance).
        noise_scale: factor on the head's noise.
        seed: int64 ``[2]``.
    """

    def __init__(
        self,
        model: ContinuousTransformer,
        *,
        num_draws: int,
        is_published: bool,
        noise_scale: float,
        seed: Tensor,
    ) -> None:
        self.model, self.backbone = model, model.transformer
        self.patch_size = model.patch_size
        self.num_draws, self.is_published = num_draws, is_published
        self.noise_scale, self.seed = noise_scale, seed

    @property
    def estimator(self) -> str:
        """See `ChunkSampler`."""
        return "two draws, as published" if self.is_published else "pairs among all draws"

    def inputs(self, input_ids: Tensor) -> Tensor:
        """All chunks but the last; see `ChunkSampler`."""
        return self.embed(input_ids)[:, :-1]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embedded chunks; see `ChunkSampler`."""
        return self.model.embed_patches(input_ids)

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """Shares of N draws; a rollout continues with the first. See `ChunkSampler`."""
        seed = advance(self.seed, rows.flatten() + depth * DEPTH_STRIDE)
        size = max(1, DRAWS_AT_A_TIME // self.num_draws)
        targets = [None] if target is None else target.flatten(0, 1).split(size)
        parts = [
            self._draw(*part)
            for part in zip_longest(hidden.flatten(0, 1).split(size), seed.split(size), targets)
        ]
        draws = torch.cat(parts, dim=1).unflatten(1, rows.shape)  # [N, B, Q, K]
        matches = None
        if target is not None:
            matches = prefix_matches(draws, target)
            matches = matches if self.is_published else matches.mean(0, keepdim=True)
        agreement = (draws[1:] == draws[:1]).all(-1).to(torch.float32).mean(0)
        return Step(draws[0], agreement, prefix_collisions(draws), matches)

    def _draw(self, hidden: Tensor, seed: Tensor, target: Tensor | None) -> Tensor:
        """Token ids ``[N, R, K]``; with a target that holds a whole n-gram, only what is compared:
        no rollout continues with them.
        """
        latents = self.model.generative_head.sample(
            hidden, num_samples=self.num_draws, seed=seed, noise_scale=self.noise_scale
        )
        if not torch.isfinite(latents).all():
            raise UserError(
                "the head drew latents that are not finite: the weights are damaged or training "
                "diverged; load an earlier checkpoint"
            )
        if target is None or self.patch_size < MAX_ORDER:
            return self.model.decode_latents(latents)
        return self.model.decode_compared(latents, target)


class TokenSampler:
    """Exact chances of the next token; a draw only decides where a rollout goes on.

    Args:
        model: the baseline.
        is_published: let a second draw decide whether a rollout's prefix collides, as published,
            instead of its exact chance.
        seed: int64 ``[2]``.
    """

    patch_size = 1

    def __init__(self, model: BaselineTransformer, *, is_published: bool, seed: Tensor) -> None:
        self.model, self.backbone = model, model.model
        self.is_published, self.seed = is_published, seed

    @property
    def estimator(self) -> str:
        """See `ChunkSampler`."""
        return "exact chances, two draws for prefixes" if self.is_published else "exact chances"

    def inputs(self, input_ids: Tensor) -> Tensor:
        """All tokens but the last; see `ChunkSampler`."""
        return self.embed(input_ids)[:, :-1]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embedded tokens; see `ChunkSampler`."""
        return self.model.get_input_embeddings()(input_ids)

    def step(self, hidden: Tensor, target: Tensor | None, rows: Tensor, depth: int) -> Step:
        """Chances under the softmax; see `ChunkSampler`. Logits are formed a few rows at a time."""
        seed = advance(self.seed, rows.flatten() + depth * DEPTH_STRIDE)
        chance = noise.uniform(
            rows.numel(),
            2,
            stream=noise.Stream.HEAD,
            seed=seed,
            device=hidden.device,
            dtype=torch.float64,
        )
        wanted = torch.zeros_like(rows) if target is None else target[..., 0].clamp(min=0)
        size = max(1, LOGITS_AT_A_TIME // self.model.config.vocab_size)
        parts = [
            self._law(*part)
            for part in zip(
                hidden.flatten(0, 1).split(size),
                wanted.flatten().split(size),
                chance.split(size),
                strict=True,
            )
        ]
        token, agreement, collision, match = (
            torch.cat(values).view(rows.shape) for values in zip(*parts, strict=True)
        )
        return Step(token[..., None], agreement, collision[..., None], match[None, ..., None])

    def _law(
        self, hidden: Tensor, wanted: Tensor, chance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drawn token, chance of agreement, sum_x P(x)^2 and P(wanted), each ``[rows]``."""
        law = self.model.lm_head(hidden).to(torch.float32).softmax(-1)  # [rows, V]
        cumulative = law.cumsum(-1, dtype=torch.float64)
        # Inverse of the distribution function; the right side of a step has positive probability.
        drawn = torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=law.shape[-1] - 1)
        token = drawn[:, :1]
        if self.is_published:
            agreement = (drawn[:, 1:] == token).to(law.dtype)
        else:
            agreement = law.gather(1, token)
        match = law.gather(1, wanted[:, None])
        return token[:, 0], agreement[:, 0], law.square().sum(-1), match[:, 0]


def make_sampler(
    model: PreTrainedModel,
    *,
    num_samples: int,
    brier_draws: int | None,
    noise_scale: float,
    seed: Tensor,
) -> ChunkSampler:
    """The sampler of a CALM or of the baseline; arguments as `calm.evaluation.brier_scores`."""
    num_draws = num_samples if brier_draws is None else brier_draws
    if not 2 <= num_draws <= num_samples:
        raise UserError(
            "brier_draws must lie between 2 and num_samples, and num_samples be at least 2; "
            f"got brier_draws={brier_draws}, num_samples={num_samples}"
        )
    if not (noise_scale >= 0 and math.isfinite(noise_scale)):
        raise UserError(f"noise_scale must be finite and at least 0, got {noise_scale}")
    if isinstance(model, ContinuousTransformer):
        return CALMSampler(
            model,
            num_draws=num_draws,
            is_published=brier_draws == 2,
            noise_scale=noise_scale,
            seed=seed,
        )
    if isinstance(model, BaselineTransformer):
        if noise_scale != 1:
            raise UserError(
                f"noise_scale must be 1 for a {type(model).__name__}, which has no noise; "
                f"got {noise_scale}"
            )
        return TokenSampler(model, is_published=brier_draws == 2, seed=seed)
    raise UserError(f"model must be a CALM or the token baseline, got {type(model).__name__}")
