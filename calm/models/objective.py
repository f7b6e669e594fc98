"""What a CALM may learn instead of its head's own loss, and what it learns it from.

Shapes: B batch, S predicted chunks of a sequence, K tokens of a chunk, L latent size, H hidden
size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from calm.labels import IGNORE_INDEX, chunk_labels, counted_chunks
from calm.models.heads.base import HeadLoss, Posterior

__all__ = ["Objective", "PredictedChunks"]


@dataclass(frozen=True)
class PredictedChunks:
    """The chunks of a batch that are predicted, and what a loss may need to know of them.

    What takes a forward pass, `hidden` and `posterior`, is computed when it is first read: a loss
    that reads neither pays for neither.

    Attributes:
        model: a `calm.models.ContinuousTransformer`.
        input_ids: the text, ``[B, (S+1)*K]``.
        targets: its labels but for the first chunk's, ``[B, S*K]``, -100 where they do not count.
    """

    model: Any
    input_ids: Tensor
    targets: Tensor

    @cached_property
    def weight(self) -> Tensor:
        """1 for a chunk that counts, 0 for a masked one, float32 ``[B, S]``."""
        return counted_chunks(self.targets, self.model.patch_size).to(torch.float32)

    @cached_property
    def labels(self) -> Tensor:
        """Labels of each chunk, ``[B, S, K]``, all -100 where it does not count."""
        return chunk_labels(self.targets, self.model.patch_size)

    @cached_property
    def tokens(self) -> Tensor:
        """The labels, and where there is none the input token, ``[B, S*K]``."""
        inputs = self.input_ids[:, self.model.patch_size :]
        return torch.where(self.targets == IGNORE_INDEX, inputs, self.targets)

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states ``[B, S, H]``: ``hidden[:, s]`` has read the first (s+1)*K tokens."""
        return self.model.hidden_states(self.input_ids[:, : -self.model.patch_size])

    @cached_property
    def posterior(self) -> Posterior:
        """Distribution of the latents to predict."""
        mean, log_std = self.model.encode(self.tokens)
        return Posterior(mean, log_std, self.weight)


class Objective(Protocol):
    """What a model learns instead of its head's own loss.

    Its attribute ``measures``, if there is one, names what of `HeadLoss.measured` an evaluation
    reports; training logs all of it. With ``predicts_text = True`` an evaluation reports BrierLM
    and what else it does without an objective, since that is what learns.
    """

    def loss(self, chunks: PredictedChunks, *, seed: Tensor, first_row: int | Tensor) -> HeadLoss:
        """Loss of each chunk.

        Args:
            chunks: with the model that learns.
            seed: of all draws.
            first_row: global index of the first chunk.
        """
