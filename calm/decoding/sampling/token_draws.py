"""Chunks drawn token by token, from probabilities that are known.

Shapes: B sequences, N draws, K tokens (and slots) of a chunk, H hidden size, V vocabulary size.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.decoding.sampling.prefix_rejection import Prefix
from calm_kernels import uniform_draws
from calm_kernels.noise import Stream

__all__ = ["SlotReadout", "draw_chunks", "draw_tokens", "token_chances"]

COLDEST = 1e-30  # T at which each chance has long been 0 or 1, and float32 holds logits / T


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
        temperature: T >= 0, see `token_chances`.
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
        logits = readout.logits(readout.slot(hidden, known)).to(torch.float32)
        chances, is_usable = token_chances(logits, temperature)
        is_finite = is_finite & is_usable.view(-1, rows).all(0)
        chances = chances.expand(num_draws, rows, -1)
        drawn = draw_tokens(chances.flatten(0, 1), uniforms[..., slot].reshape(-1, 1))
        drawn = drawn.view(num_draws, rows)
        if prefix is not None:
            drawn = torch.where(slot < prefix.length, prefix.tokens[:, slot], drawn)
        tokens = torch.cat([tokens, drawn[..., None]], dim=-1)
    return tokens, is_finite


def token_chances(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax(logits / T); for T = 0 its limit, 1 at the first of the largest logits.

    Args:
        logits: float32 ``[..., V]``.
        temperature: T >= 0; below 1e-30 as at 1e-30.

    Returns: float32 ``[..., V]``, and whether all logits / T were finite, bool ``[...]``.
    """
    if temperature > 0:
        logits = logits / max(temperature, COLDEST)
        chances = logits.softmax(-1)
    else:
        chances = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return chances, torch.isfinite(logits).all(-1)


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens drawn by the inverse of the cumulative distribution.

    Args:
        probabilities: ``[B, V]``. They are summed in float64, so that the last of 1e5 terms counts.
        uniforms: N draws for each row from the uniform distribution on [0, 1), float64 ``[B, N]``.

    Returns: int64 ``[B, N]``.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # right=True never returns a token of probability 0; rounding may lead past the last token.
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return tokens.clamp(max=probabilities.shape[-1] - 1)
