"""From the backbone's hidden states to the next chunk: the engine's view of a model.

`ChunkPredictor` is a CALM with any head and a sampling method, `ReadoutPredictor` a CALM whose
readout draws the tokens of a chunk, `TokenPredictor` the token-by-token baseline, whose chunk is
one token drawn from the softmax. The engine treats all alike, so that their speeds can be compared.
A model makes its own predictor, see `calm.decoding.mixin`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from calm.decoding.chunk import Chunk
from calm.decoding.sampling.chunk_distribution import ChunkDistribution, Method
from calm.decoding.sampling.prefix_rejection import Prefix
from calm.decoding.sampling.token_draws import draw_chunks
from calm_kernels import chunk_record, softmax_draws

__all__ = ["ChunkPredictor", "Predictor", "ReadoutPredictor", "TokenPredictor"]


class Predictor(Protocol):
    """A model and how its next chunk is chosen; equal predictors make equal choices."""

    @property
    def model(self) -> Any:
        """The model, a `PreTrainedModel`."""

    @property
    def backbone(self) -> Any:
        """The `LlamaModel` that reads embedded chunks."""

    @property
    def patch_size(self) -> int:
        """K."""

    @property
    def start_token_id(self) -> int | None:
        """The token of the chunk before each text; None without one."""

    @property
    def is_capturable(self) -> bool:
        """Whether `choose` has fixed shapes and does not synchronise."""

    @property
    def is_one_draw(self) -> bool:
        """Whether `choose` takes one draw of each sequence; a sequence more then costs little."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids ``[B, P * K]`` to the backbone's inputs ``[B, P, H]``."""

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """The chunk after each hidden state ``[B, H]``; seeds are int64 ``[B, 2]``."""

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """The same, given its first tokens; see `Method.complete`."""


@dataclass(frozen=True)
class _CALMPredictor:
    """What predictors of a CALM share."""

    model: Any

    @property
    def backbone(self) -> Any:
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

    def embed(self, input_ids: Tensor) -> Tensor:
        """See `Predictor`."""
        return self.model.embed_patches(input_ids)


@dataclass(frozen=True)
class ChunkPredictor(_CALMPredictor):
    """A CALM and a sampling method.

    Attributes:
        model: a `calm.models.ContinuousTransformer`.
        method: how a chunk is chosen.
    """

    method: Method

    @property
    def is_capturable(self) -> bool:
        """See `Predictor`."""
        return self.method.is_capturable

    @property
    def is_one_draw(self) -> bool:
        """See `Predictor`."""
        return self.method.is_one_draw

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        return self.method.choose(self._distribution(hidden), seed)

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        return self.method.complete(self._distribution(hidden), given, given_length, seed)

    def _distribution(self, hidden: Tensor) -> ChunkDistribution:
        return self.model.distribution(hidden, self.method.head_temperature)


@dataclass(frozen=True)
class ReadoutPredictor(_CALMPredictor):
    """A CALM's readout at temperature T: one draw of a chunk, token by token; its head is not used.

    Attributes:
        model: a `calm.models.ContinuousTransformer` that has a readout.
        temperature: T >= 0; 0 takes the likeliest token of each slot.
    """

    temperature: float

    is_capturable = True
    is_one_draw = True

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        return self._draw(hidden, seed, None)

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`; there is no draw that would have to be rejected."""
        return self._draw(hidden, seed, Prefix(given, given_length))

    def _draw(self, hidden: Tensor, seed: Tensor, prefix: Prefix | None) -> Chunk:
        tokens, is_finite = draw_chunks(
            self.model.slot_readout(), hidden, seed, num_draws=1, temperature=self.temperature,
            prefix=prefix,
        )  # fmt: skip
        return Chunk(chunk_record(tokens[0], is_finite))


@dataclass(frozen=True)
class TokenPredictor:
    """The baseline at temperature T: one draw from softmax(logits / T), no top-k or top-p.

    Attributes:
        model: a `calm.models.BaselineTransformer`.
        temperature: T >= 0; 0 takes the likeliest token.
    """

    model: Any
    temperature: float

    patch_size = 1
    start_token_id = None
    is_capturable = True
    is_one_draw = True

    @property
    def backbone(self) -> Any:
        """See `Predictor`."""
        return self.model.model

    def embed(self, input_ids: Tensor) -> Tensor:
        """See `Predictor`."""
        return self.backbone.embed_tokens(input_ids)

    def choose(self, hidden: Tensor, seed: Tensor) -> Chunk:
        """See `Predictor`."""
        logits = self.model.lm_head(hidden)  # [B, V]
        tokens, is_finite = softmax_draws(logits, temperature=self.temperature, seed=seed)
        return Chunk(chunk_record(tokens, is_finite))

    def complete(self, hidden: Tensor, given: Tensor, given_length: Tensor, seed: Tensor) -> Chunk:
        """Not possible: a part of one token cannot be given."""
        raise NotImplementedError("a chunk of one token has no first part that a prompt could give")
