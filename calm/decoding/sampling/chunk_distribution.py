"""What sampling methods draw from.

A method sees a model as a `ChunkDistribution`: a distribution over latents for each sequence of a
batch, and a decoder in two steps. The first step turns a latent into K slots, one hidden state for
each token of the chunk. The second step turns a slot into a token id. A method can so skip tokens
that cannot matter. `HeadDistribution` is that of a CALM; tests write distributions that are known
exactly.

Shapes: B sequences, N draws, L latent size, K tokens (and slots) of a chunk, H hidden size.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from calm.decoding.chunk import Chunk

__all__ = ["ChunkDistribution", "HeadDistribution", "Method", "decode"]


class ChunkDistribution(Protocol):
    """The distribution of the next chunk of each of B sequences."""

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
        """Latents ``[..., L]`` to slots, one hidden state for each token, ``[..., K, H]``."""

    def project(self, slots: Tensor) -> Tensor:
        """Slots ``[..., H]`` to token ids ``[...]``."""

    def select(self, rows: Tensor) -> "ChunkDistribution":
        """The sequences `rows`, int64 ``[b]``."""


class Method(Protocol):
    """How a chunk is chosen: a frozen dataclass of its parameters."""

    @property
    def noise_scale(self) -> float:
        """Factor on the head's noise."""

    @property
    def head_temperature(self) -> float:
        """T of the head that it draws from; 1 for the head of the model as it is."""

    @property
    def is_capturable(self) -> bool:
        """Whether `choose` has fixed shapes and does not synchronise."""

    @property
    def is_one_draw(self) -> bool:
        """Whether `choose` takes one draw of each sequence."""

    def choose(self, distribution: ChunkDistribution, seed: Tensor) -> Chunk:
        """The next chunk of each sequence; `seed` is int64 ``[B, 2]``, a stream for each."""

    def complete(
        self, distribution: ChunkDistribution, given: Tensor, given_length: Tensor, seed: Tensor
    ) -> Chunk:
        """The next chunk of each sequence, given its first tokens.

        Args:
            distribution: of the chunk without the given tokens.
            given: ``[B, K]``. Where no draw within the cap begins with the given tokens, all of
                this row is returned and flagged: what follows them is the fallback.
            given_length: how many are given, int64 ``[B]``, 0 to K.
            seed: int64 ``[B, 2]``, a stream for each.
        """


class HeadDistribution:
    """The distribution of a CALM's head, given the backbone's hidden states.

    Args:
        head: draws latents, a `calm.models.heads.base.GenerativeHead`.
        decoder: of the autoencoder, a `calm.models.autoencoder.Decoder`.
        hidden: ``[B, H]``.
        spread: factor of the head's own on what its noise contributes, beside that of a method.
    """

    def __init__(self, head: Any, decoder: Any, hidden: Tensor, spread: float = 1.0) -> None:
        self.head, self.decoder, self.hidden, self.spread = head, decoder, hidden, spread
        self.patch_size: int = decoder.patch_size
        self.device = hidden.device

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
        return self.head.sample(
            self.hidden,
            num_samples=num_samples,
            seed=seed,
            noise_scale=noise_scale,
            noise_spread=noise_spread * self.spread,
        )

    def slots(self, latents: Tensor) -> Tensor:
        """See `ChunkDistribution`."""
        return self.decoder.expand(latents)

    def project(self, slots: Tensor) -> Tensor:
        """See `ChunkDistribution`; the logits are never formed."""
        return self.decoder.project(slots)

    def select(self, rows: Tensor) -> "HeadDistribution":
        """See `ChunkDistribution`."""
        return HeadDistribution(self.head, self.decoder, self.hidden[rows], self.spread)


def decode(distribution: ChunkDistribution, latents: Tensor) -> Tensor:
    """Latents ``[..., L]`` to token ids ``[..., K]``."""
    return distribution.project(distribution.slots(latents))
