"""What sampling methods draw from, and what they return.

A method sees a model as a `ChunkDistribution`: a distribution over latents for each sequence of a
batch, and a decoder in two steps (latent -> one hidden state a slot -> token), so that it can skip
tokens which cannot matter. `HeadDistribution` is a CALM after its backbone; tests write
distributions that are known exactly.

Shapes: B sequences, N draws, L latent size, K tokens of a chunk (slots), H hidden size.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calm.models.continuous import ContinuousTransformer

__all__ = ["Chunk", "ChunkDistribution", "HeadDistribution", "Method", "decode"]


class Chunk(NamedTuple):
    """The next chunk of each sequence, and how it was found.

    Attributes:
        tokens: ``[B, K]``.
        level: draws that agreed, ``[B]``: the whole part of 1/T, or less where a vote had to settle
            for less; 1 for methods that compare no tokens.
        draws: head draws of this chunk, ``[B]``; `Exact` counts them as Algorithm 1 is written.
        is_fallback: whether a stated fallback decided, bool ``[B]``: draws came to their cap.
        is_finite: whether all latents were finite, bool ``[B]``; where not, tokens mean nothing.
        saved: draws that `draws` counts, but that a round did not need because it stopped at its
            first mismatch, ``[B]``; None for methods without rounds.
    """

    tokens: Tensor
    level: Tensor
    draws: Tensor
    is_fallback: Tensor
    is_finite: Tensor
    saved: Tensor | None = None


class ChunkDistribution(Protocol):
    """The law of the next chunk of each of B sequences."""

    @property
    def patch_size(self) -> int:
        """K."""

    @property
    def device(self) -> torch.device:
        """Where draws are made."""

    def __len__(self) -> int:
        """B."""

    def latents(
        self,
        num_samples: int,
        seed: Tensor,
        *,
        noise_scale: float = 1.0,
        noise_spread: float = 1.0,
    ) -> Tensor:
        """N independent draws for each sequence, ``[N, B, L]``.

        Draw i of a sequence depends on its own seed, int64 ``[B, 2]``, and on i alone.
        `noise_scale` and `noise_spread` are those of `GenerativeHead.sample`.
        """

    def slots(self, latents: Tensor) -> Tensor:
        """Latents ``[..., L]`` to the hidden states of their tokens, ``[..., K, H]``."""

    def project(self, slots: Tensor) -> Tensor:
        """Hidden states ``[..., H]`` to token ids ``[...]``."""

    def select(self, rows: Tensor) -> "ChunkDistribution":
        """The sequences `rows`, int64 ``[b]``."""


class Method(Protocol):
    """How a chunk is chosen: a frozen dataclass of its parameters."""

    @property
    def is_capturable(self) -> bool:
        """Whether `choose` has fixed shapes and reads nothing back from a GPU."""

    def choose(self, source: ChunkDistribution, seed: Tensor) -> Chunk:
        """The next chunk of each sequence; `seed` is int64 ``[B, 2]``, a stream for each."""

    def complete(
        self, source: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """The next chunk of each sequence, its first tokens being known.

        Args:
            source: the law without that knowledge.
            given: ``[B, K]``; what follows the known tokens is the chunk that is returned, flagged,
                where no draw within the cap begins with them (published: pad tokens).
            given_length: how many are known, int64 ``[B]``, 0 to K.
            seed: int64 ``[B, 2]``.
        """


class HeadDistribution:
    """A model's head after the backbone's hidden states.

    Args:
        model: a CALM.
        hidden: ``[B, H]``.
    """

    def __init__(self, model: ContinuousTransformer, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden
        self.patch_size, self.device = model.patch_size, hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def latents(
        self,
        num_samples: int,
        seed: Tensor,
        *,
        noise_scale: float = 1.0,
        noise_spread: float = 1.0,
    ) -> Tensor:
        """See `ChunkDistribution`."""
        return self.model.generative_head.sample(
            self.hidden,
            num_samples=num_samples,
            seed=seed,
            noise_scale=noise_scale,
            noise_spread=noise_spread,
        )

    def slots(self, latents: Tensor) -> Tensor:
        """See `ChunkDistribution`."""
        return self.model.ae_model.decoder.expand(latents)

    def project(self, slots: Tensor) -> Tensor:
        """See `ChunkDistribution`; the logits are never formed."""
        return self.model.ae_model.decoder.project(slots)

    def select(self, rows: Tensor) -> "HeadDistribution":
        """See `ChunkDistribution`."""
        return HeadDistribution(self.model, self.hidden[rows])


def decode(source: ChunkDistribution, latents: Tensor) -> Tensor:
    """Latents ``[..., L]`` to token ids ``[..., K]``."""
    return source.project(source.slots(latents))
