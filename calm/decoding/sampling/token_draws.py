"""Chunks drawn token by token, from probabilities that are known.

Shapes: B sequences, N draws, K tokens (and slots) of a chunk, H hidden size, V vocabulary size.
"""

from typing import Protocol

import torch
from torch import Tensor

from calm.decoding.sampling.prefix_rejection import Prefix
from calm_kernels import softmax_draws, uniform_draws
from calm_kernels.noise import Stream

__all__ = ["SlotReadout", "draw_chunks"]


class SlotReadout(Protocol):
    """Logits of the K tokens that follow a hidden state.

    The features of slot j are those of the hidden state and, if it `is_causal`, of the chunk's
    tokens before it: the product of the tokens' probabilities is then that of the chunk.
    """

    @property
    def patch_size(self) -> int:
        """K."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def is_causal(self) -> bool:
        """Whether slots depend on the tokens before them."""

    def features(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of all slots: ``[..., H]`` and ``[..., K]`` to ``[..., K, H]``."""

    def slot(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of the slot after the tokens ``[..., j]``: ``[..., H]``."""

    def logits(self, features: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., V]``."""


def draw_chunks(
    readout: SlotReadout,
    hidden: Tensor,
    seed: Tensor,
    *,
    num_draws: int,
    temperature: float = 1.0,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks whose tokens are drawn from softmax(logits / T), one slot after the other.

    Given tokens condition those after them exactly. Shapes are fixed, and nothing synchronises.

    Args:
        readout: of the model.
        hidden: ``[B, H]``.
        seed: int64 ``[B, 2]``; each token takes one number of its row's stream.
        num_draws: N.
        temperature: T >= 0, see `calm_kernels.softmax_draws`.
        prefix: the first tokens of the chunks, if they are given.

    Returns: tokens ``[N, B, K]``, and whether all logits / T were finite, bool ``[B]``; where not,
        tokens mean nothing.
    """
    rows = len(hidden)
    uniforms = uniform_draws(
        rows, readout.patch_size, stream=Stream.HEAD, seed=seed, num_draws=num_draws,
        device=hidden.device, dtype=torch.float64,
    )  # fmt: skip
    tokens = torch.empty(num_draws, rows, 0, dtype=torch.int64, device=hidden.device)
    is_finite = torch.ones(rows, dtype=torch.bool, device=hidden.device)
    for slot in range(readout.patch_size):
        known = tokens if readout.is_causal else tokens[:1]  # all draws see the same
        logits = readout.logits(readout.slot(hidden, known)).flatten(0, -2)
        # [N B, V], or [B, V] where draws share them; those of a row are side by side.
        groups = len(logits) // rows
        points = uniforms[..., slot].view(groups, -1, rows).transpose(1, 2)
        drawn, is_usable = softmax_draws(logits, points.flatten(0, 1), temperature=temperature)
        is_finite = is_finite & is_usable.view(groups, rows).all(0)
        drawn = drawn.view(groups, rows, -1).transpose(1, 2).reshape(num_draws, rows)
        if prefix is not None:
            drawn = torch.where(slot < prefix.length, prefix.tokens[:, slot], drawn)
        tokens = torch.cat([tokens, drawn[..., None]], dim=-1)
    return tokens, is_finite
