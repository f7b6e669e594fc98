"""Prompts: checking them, cutting them to the context, and lengths that K does not divide."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import UserError

__all__ = ["ALIGNMENTS", "Prompt", "align_prompt", "check_prompt", "fit_context", "pads_last"]

ALIGNMENTS = ("condition", "pad")


@dataclass(frozen=True)
class Prompt:
    """A prompt as chunks.

    Attributes:
        input_ids: whole chunks, ``[B, P * K]``; padded on the right for the alignment ``pad``.
        given: the start of the first new chunk, ``[B, r]`` with 0 <= r < K; empty for ``pad``.
    """

    input_ids: Tensor
    given: Tensor

    @property
    def length(self) -> int:
        """Tokens that count towards the length of the result."""
        return self.input_ids.shape[1] + self.given.shape[1]


def check_prompt(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
    """Raise `UserError` unless `input_ids` are token ids ``[B, T]``, T >= 1, without padding."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise UserError(
            f"input_ids must be int64 [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if input_ids.numel() == 0:
        raise UserError(f"input_ids must hold a token, got shape {tuple(input_ids.shape)}")
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"input_ids must lie in [0, {vocab_size}), the vocabulary; got ids from {low} to {high}"
        )
    if attention_mask is not None and not attention_mask.bool().all():
        raise UserError(
            "attention_mask hides tokens, but prompts of different lengths in one batch are not "
            "supported; generate them one by one, or group prompts of equal length"
        )


def align_prompt(
    input_ids: Tensor,
    *,
    patch_size: int,
    alignment: str,
    pad_token_id: int | None,
) -> Prompt:
    """Cut a prompt into chunks of `patch_size` tokens.

    ``condition`` keeps the tokens of an unfinished chunk apart: they condition its sampling.
    ``pad`` fills it with pad tokens that the model reads like text (published).
    """
    if alignment not in ALIGNMENTS:
        raise UserError(
            f"prompt_alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}"
        )
    rest = input_ids.shape[1] % patch_size
    if alignment == "pad" and rest:
        if pad_token_id is None:
            raise UserError(
                'prompt_alignment="pad" needs config.pad_token_id; set it, or use '
                '"condition", which pads nothing'
            )
        padding = input_ids.new_full((len(input_ids), patch_size - rest), pad_token_id)
        input_ids, rest = torch.cat([input_ids, padding], dim=1), 0
    whole = input_ids.shape[1] - rest
    return Prompt(input_ids[:, :whole], input_ids[:, whole:])


def pads_last(sequences: Tensor, pad_token_id: int) -> Tensor:
    """Each row ``[B, T]`` with its pad tokens moved to the end, the others in their order."""
    order = (sequences == pad_token_id).to(torch.uint8).argsort(dim=1, stable=True)
    return sequences.gather(1, order)


def fit_context(
    input_ids: Tensor, *, new_tokens: int, patch_size: int, context: int, truncate: bool
) -> Tensor:
    """The prompt, if it and `new_tokens` fit into `context` chunks; else its end, or an error.

    What `truncate` leaves is a whole number of chunks.
    """
    room = (context - math.ceil(new_tokens / patch_size)) * patch_size
    length = input_ids.shape[1]
    if length <= room:
        return input_ids
    if room <= 0 or not truncate:
        raise UserError(
            f"the prompt ({length} tokens) and {new_tokens} new tokens exceed the context of "
            f"{context * patch_size} tokens; ask for fewer"
            + (", or pass truncate=True to drop the beginning of the prompt" if room > 0 else "")
        )
    return input_ids[:, length - room :]
