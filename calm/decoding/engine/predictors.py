"""From a backbone's states to the next chunk: all that the engine asks of a model.

`ChunkPredictor` is a CALM with any head and a sampling method, `TokenPredictor` the token-by-token
baseline, whose chunk is one token drawn from the softmax. The engine treats both alike, so that
their speeds can be compared.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel

from calm.decoding.engine.layout import by_columns
from calm.decoding.sampling.chunk_distribution import Chunk, HeadDistribution, Method
from calm.decoding.sampling.methods import build_method
from calm.errors import UserError
from calm.models.baseline import BaselineTransformer
from calm.models.continuous import ContinuousTransformer
from calm_kernels import noise

__all__ = ["ChunkPredictor", "Predictor", "TokenPredictor", "make_predictor"]


class Predictor(Protocol):
    """A model and how its next chunk is chosen; equal predictors choose alike."""

    @property
    def model(self) -> PreTrainedModel:
        """The model."""

    @property
    def backbone(self) -> LlamaModel:
        """What reads embedded chunks."""

    @property
    def patch_size(self) -> int:
        """K."""

    @property
    def start_token_id(self) -> int | None:
        """The token of the chunk before each text; None without one."""

    @property
    def is_capturable(self) -> bool:
        """Whether `choose` has fixed shapes and reads nothing back from a GPU."""

    def arrange(self) -> Any:
        """The model with all but its backbone laid out for few rows, see `by_columns`."""

    def using(self, model: Any) -> "Predictor":
        """The same on what `arrange` gave."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, P * K]`` to the backbone's inputs ``[B, P, H]``."""

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """The chunk after each state ``[B, H]``; seeds are int64 ``[B, 2]``."""

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """The same, given its first tokens; see `Method.complete`."""


@dataclass(frozen=True)
class ChunkPredictor:
    """A CALM and a sampling method."""

    model: ContinuousTransformer
    method: Method

    @property
    def backbone(self) -> LlamaModel:
        """See `Predictor`."""
        return self.model.transformer

    @property
    def patch_size(self) -> int:
        """See `Predictor`."""
        return self.model.patch_size

    @property
    def start_token_id(self) -> int | None:
        """See `Predictor`."""
        return self.model.start_token_id

    @property
    def is_capturable(self) -> bool:
        """See `Predictor`."""
        return self.method.is_capturable

    def arrange(self) -> ContinuousTransformer:
        """See `Predictor`."""
        return by_columns(self.model, self.backbone, self.model.ae_model.encoder)

    def using(self, model: ContinuousTransformer) -> "ChunkPredictor":
        """See `Predictor`."""
        return replace(self, model=model)

    def embed(self, input_ids: Tensor) -> Tensor:
        """See `Predictor`."""
        return self.model.embed_patches(input_ids)

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        return self.method.choose(HeadDistribution(self.model, hidden), seed)

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        return self.method.complete(HeadDistribution(self.model, hidden), given, given_length, seed)


@dataclass(frozen=True)
class TokenPredictor:
    """The baseline at temperature T: one draw from softmax(logits / T), no top-k or top-p."""

    model: BaselineTransformer
    temperature: float

    patch_size = 1
    start_token_id = None
    is_capturable = True

    @property
    def backbone(self) -> Any:
        """See `Predictor`."""
        return self.model.model

    def arrange(self) -> BaselineTransformer:
        """See `Predictor`."""
        return by_columns(self.model, self.backbone)

    def using(self, model: BaselineTransformer) -> "TokenPredictor":
        """See `Predictor`."""
        return replace(self, model=model)

    def embed(self, input_ids: Tensor) -> Tensor:
        """See `Predictor`."""
        return self.backbone.embed_tokens(input_ids)

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`. One uniform draw a sequence, through the inverse distribution function.

        Probabilities are summed in float64: the last of 1e5 terms still counts.
        """
        logits = self.model.lm_head(hidden).to(torch.float32)  # [B, V]
        cumulative = (logits / self.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = noise.uniform(
            len(hidden), 1, stream=noise.Stream.VOTE, seed=seed, device=hidden.device,
            dtype=torch.float64,
        )  # fmt: skip
        # The right side of a step has positive probability; rounding may lead past the last one.
        token = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
        one = torch.ones_like(seed[:, 0])
        is_finite = torch.isfinite(logits).all(-1)
        tokens = token.clamp(max=logits.shape[-1] - 1)
        return Chunk(tokens, one, one, torch.zeros_like(is_finite), is_finite)

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """Nothing of a token can be given."""
        raise NotImplementedError("a chunk of one token has no first part that a prompt could give")


def make_predictor(
    model: PreTrainedModel,
    *,
    method: str,
    temperature: float,
    num_samples: int,
    noise_scale: float,
    max_draws: int | None,
) -> Predictor:
    """The predictor of a CALM or of the baseline; arguments as `calm.decoding.generate`."""
    chosen = build_method(
        method,
        temperature=temperature,
        num_samples=num_samples,
        noise_scale=noise_scale,
        max_draws=max_draws,
    )
    if isinstance(model, ContinuousTransformer):
        return ChunkPredictor(model, chosen)
    if not isinstance(model, BaselineTransformer):
        raise UserError(f"model must be a CALM or the token baseline, got {type(model).__name__}")
    if noise_scale != 1:
        raise UserError(
            f"noise_scale must be 1 for a {type(model).__name__}, which has no head whose noise "
            f"could be scaled; got {noise_scale}"
        )
    return TokenPredictor(model, temperature)
