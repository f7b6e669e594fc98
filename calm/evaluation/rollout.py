"""Rollouts: one continuation of a cached sequence at each start position, in one forward pass.

An n-gram that spans several chunks needs, for its collision term, a continuation of the true prefix
at every start position. The true sequence is read once, into a KV cache. A branch at start ``s``
attends to positions 0 .. s of it and to its own chunks, not to other branches. One attention mask
says so, and all branches advance together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from calm.errors import UserError

__all__ = ["MAX_BRANCHES", "Branches", "Step", "chain_matches", "roll_out"]

MASKED_ATTENTION = ("sdpa", "eager")
MAX_BRANCHES = 512  # start positions that advance together: bounds the mask and the cache


class Step(NamedTuple):
    """What one chunk contributes to Brier-n; Q positions, n = 1 .. k tokens of the chunk.

    Attributes:
        tokens: the chunk that a rollout continues with, ``[B, Q, K]``.
        agreement: probability that another draw equals `tokens`, ``[B, Q]``.
        collisions: estimate of sum_x P(x)^2 over the first n tokens, ``[B, Q, k]``.
        matches: probability that the first n tokens are the target's, ``[D, B, Q, k]``, of each
            of D draws or (D = 1) of all; None without a target.
    """

    tokens: Tensor
    agreement: Tensor
    collisions: Tensor
    matches: Tensor | None


class Branches:
    """A sequence in a KV cache, and continuations of it.

    Args:
        backbone: a decoder that takes `inputs_embeds` and a four-dimensional mask (eager or sdpa).
        inputs_embeds: the true sequence, ``[B, S, H]``.

    Attributes:
        hidden: hidden states of the true sequence, ``[B, S, H]``.
    """

    def __init__(self, backbone: PreTrainedModel, inputs_embeds: Tensor) -> None:
        self.backbone = backbone
        self.cache = DynamicCache(config=backbone.config)
        self.length = inputs_embeds.shape[1]
        self.hidden = backbone(
            inputs_embeds=inputs_embeds, past_key_values=self.cache, use_cache=True
        ).last_hidden_state

    def begin(self, starts: Tensor) -> None:
        """Drop earlier branches and open one after each position in `starts`.

        Args:
            starts: int64 ``[Q]``, of all sequences alike, or ``[B, Q]``. A position may open
                several.
        """
        branched = self.cache.get_seq_length() - self.length
        if branched:
            self.cache.crop(-branched)
        self.starts = starts if starts.dim() == 2 else starts[None]
        positions = torch.arange(self.length, device=starts.device)
        # [B or 1, Q, S], then [B or 1, Q, S + depth * Q]
        self.visible = positions <= self.starts[..., None]
        self.depth = 0

    def extend(self, inputs_embeds: Tensor) -> Tensor:
        """Append one chunk to each branch, ``[B, Q, H]``; returns its hidden state, ``[B, Q, H]``.

        Raises:
            UserError: the backbone's attention takes no four-dimensional mask.
        """
        attention = self.backbone.config._attn_implementation
        if attention not in MASKED_ATTENTION:
            raise UserError(
                f"rolling out needs attention that takes a mask ({', '.join(MASKED_ATTENTION)}), "
                f"got {attention!r}; load the model with attn_implementation='sdpa'"
            )
        batch, count = self.starts.shape
        own = torch.eye(count, dtype=torch.bool, device=self.starts.device)
        self.visible = torch.cat([self.visible, own.expand(batch, -1, -1)], dim=-1)
        self.depth += 1
        mask = torch.zeros(self.visible.shape, dtype=inputs_embeds.dtype, device=own.device)
        mask.masked_fill_(~self.visible, torch.finfo(mask.dtype).min)
        return self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[:, None],
            position_ids=self.starts + self.depth,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def chain_matches(matches: Tensor, starts: int, chunks: int) -> Tensor:
    """Probability that an n-gram of `chunks` consecutive chunks is the true one.

    Every chunk is drawn after the true prefix, so probabilities multiply: P(first n tokens match)
    = P(all whole chunks match) * P(the first tokens of the last chunk match).

    Args:
        matches: ``[..., S, k]``, as `Step.matches`.
        starts: number of start positions, at most S - chunks + 1.
        chunks: chunks of an n-gram.

    Returns: ``[..., starts, chunks * k]``.
    """
    parts = [matches[..., :starts, :]]
    for offset in range(1, chunks):
        parts.append(parts[-1][..., -1:] * matches[..., offset : offset + starts, :])
    return torch.cat(parts, dim=-1)


def roll_out(
    branches: Branches,
    first: Step,
    starts: int,
    chunks: int,
    embed: Callable[[Tensor], Tensor],
    draw: Callable[[Tensor, Tensor, int], Step],
) -> Tensor:
    """Unbiased collision rates of n-grams of `chunks` chunks, from one branch a start position.

    sum_x P(x)^2 over n-grams = E_x[P(x_1) P(x_2 | x_1) .. sum_y P(y | x)^2] over x drawn from P:
    the branch follows one draw, weighted by the probability that another draw agrees with it so
    far, because only then do both have the same context.

    Args:
        branches: the cached true sequence.
        first: the step drawn after each position of the true sequence.
        starts: number of start positions.
        chunks: chunks of an n-gram.
        embed: token ids ``[B, Q, K]`` to inputs of the backbone ``[B, Q, H]``.
        draw: (states ``[B, Q, H]``, positions ``[Q]``, depth) to a `Step`.

    Returns: ``[B, starts, chunks * k]``.
    Cost: chunks - 1 backbone calls for each `MAX_BRANCHES` starts.
    """
    parts = []
    for begin in range(0, starts, MAX_BRANCHES):
        positions = torch.arange(
            begin, min(begin + MAX_BRANCHES, starts), device=first.tokens.device
        )
        branches.begin(positions)
        here = slice(begin, begin + len(positions))
        collisions, weight = first.collisions[:, here], first.agreement[:, here]
        tokens, terms = first.tokens[:, here], [collisions]
        for depth in range(1, chunks):
            step = draw(branches.extend(embed(tokens)), positions, depth)
            terms.append(weight[..., None] * step.collisions)
            weight, tokens = weight * step.agreement, step.tokens
        parts.append(torch.cat(terms, dim=-1))
    return torch.cat(parts, dim=1)
