"""Prompts: reading them, cutting them to the context, and lengths that K does not divide."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import UserError, UserNotice

__all__ = [
    "ALIGNMENTS",
    "Prompt",
    "PromptFormat",
    "Prompts",
    "left_aligned",
    "read_prompts",
]

ALIGNMENTS = ("condition", "pad")
Prompts = Tensor | Sequence[Sequence[int] | Tensor]


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it.

    Attributes:
        tokens: what the result begins with.
        chunks: whole chunks to read, a multiple of K, at least one; with the start chunk.
        given: the start of the first new chunk, fewer than K tokens.
        budget: new tokens at most.
    """

    tokens: list[int]
    chunks: list[int]
    given: list[int]
    budget: int


def read_prompts(
    input_ids: Prompts,
    attention_mask: Tensor | None,
    vocab_size: int,
    pad_token_id: int | None = None,
) -> list[list[int]]:
    """Prompts of any lengths as lists, without padding.

    Args:
        input_ids: int64 ``[B, T]``, or a list of B prompts: lists of ids or one-dimensional
            tensors.
        attention_mask: ``[B, T]``, 0 for padding on the left or on the right.
        vocab_size: V.
        pad_token_id: a tensor without mask that begins or ends with it gets a `UserNotice`; None
            where it may be text.

    Raises:
        UserError: not token ids, or a mask with a hole.
    """
    if isinstance(input_ids, Tensor):
        prompts = _rows(input_ids, attention_mask)
        if attention_mask is None and any(pad_token_id in (*row[:1], *row[-1:]) for row in prompts):
            warnings.warn(
                "input_ids begin or end with the pad token, and there is no attention_mask: the "
                "model reads padding as text; pass attention_mask (0 for padding), or a list of "
                "prompts of different lengths",
                UserNotice,
                stacklevel=4,
            )
    else:
        if attention_mask is not None:
            raise UserError("attention_mask goes with a tensor; a list of prompts needs none")
        prompts = [_ids(index, prompt) for index, prompt in enumerate(input_ids)]
    if not prompts:
        raise UserError("input_ids must hold at least one prompt, got none")
    ids = [token for prompt in prompts for token in prompt]
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise UserError(
            f"input_ids must lie in [0, {vocab_size}), the vocabulary; got ids from {min(ids)} to "
            f"{max(ids)}"
        )
    return prompts


def _ids(index: int, prompt: Sequence[int] | Tensor) -> list[int]:
    """One prompt of a list."""
    ids = prompt.tolist() if isinstance(prompt, Tensor) and prompt.dim() == 1 else prompt
    if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
        raise UserError(
            f"input_ids[{index}] must be a list of token ids or a one-dimensional int64 tensor, "
            f"got {type(prompt).__name__}"
        )
    return list(ids)


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The rows of a tensor, each without what the mask hides."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise UserError(
            f"input_ids must be int64 [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    prompts = []
    for index, (row, seen) in enumerate(zip(rows, attention_mask.bool().tolist(), strict=True)):
        first, count = seen.index(True) if any(seen) else 0, sum(seen)
        if not all(seen[first : first + count]):
            raise UserError(
                f"attention_mask may hide padding on the left and on the right alone, but row "
                f"{index} has a hole"
            )
        prompts.append(row[first : first + count])
    return prompts


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How prompts become chunks, and how much may follow them.

    Attributes:
        patch_size: K.
        context: chunks that the model can read, in all.
        start_token_id: token of the start chunk before each text, or None.
        pad_token_id: fills a chunk where `alignment` asks for it.
        alignment: ``condition`` keeps the tokens of an unfinished chunk apart: they condition its
            sampling. ``pad`` fills it with pad tokens that the model reads like text (published).
        max_new_tokens: tokens to add, or None.
        max_length: tokens of the result, or None; exactly one of the two is given.
        truncate: drop the beginning of a prompt that is too long.
    """

    patch_size: int
    context: int
    start_token_id: int | None
    pad_token_id: int | None
    alignment: str
    max_new_tokens: int | None
    max_length: int | None
    truncate: bool

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise UserError(
                f"prompt_alignment must be one of {', '.join(ALIGNMENTS)}; got {self.alignment!r}"
            )
        if (self.max_new_tokens is None) == (self.max_length is None):
            raise UserError("pass either max_new_tokens or max_length")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} must be a whole number, at least 1; got {value!r}")

    def apply(self, prompts: list[list[int]]) -> list[Prompt]:
        """Each prompt as chunks.

        Raises:
            UserError: an empty prompt without a start chunk, no room in the context, no pad token
                where one is needed.
        """
        formatted = [self._format(tokens) for tokens in prompts]
        short = [len(prompt) for prompt in prompts if self._is_short(prompt)]
        if short and self.alignment == "condition":
            warnings.warn(
                f"a prompt of {min(short)} tokens is shorter than a chunk of {self.patch_size}: it "
                "is filled with pad tokens, which this model never saw in training; prompts of "
                "a chunk or more are exact, as are all with a model trained with a start chunk "
                "(has_start_patch)",
                UserNotice,
                stacklevel=4,
            )
        return formatted

    def _is_short(self, tokens: list[int]) -> bool:
        """Whether nothing could be read before the first new chunk."""
        return self.start_token_id is None and len(tokens) < self.patch_size

    def _format(self, tokens: list[int]) -> Prompt:
        if not tokens and self.start_token_id is None:
            raise UserError(
                "the prompt is empty, and this model never learned how a text begins: pass at "
                "least one token (a CALM trained with has_start_patch begins texts by itself)"
            )
        new_tokens = self._new_tokens(len(tokens))
        kept = self._fit(tokens, new_tokens)
        is_whole_text = len(kept) == len(tokens)
        start: list[int] = []
        if self.start_token_id is not None and (is_whole_text or not kept):
            start = [self.start_token_id] * self.patch_size  # not before a truncated prompt
        if self.alignment == "pad":
            padded = kept + self._padding(-len(kept) % self.patch_size)
            return Prompt(padded, start + padded, [], self._published_budget(len(padded)))
        if self._is_short(kept):
            padded = kept + self._padding(self.patch_size - len(kept))
            return Prompt(kept, padded, [], new_tokens)
        whole = len(kept) - len(kept) % self.patch_size
        return Prompt(kept, start + kept[:whole], kept[whole:], new_tokens)

    def _new_tokens(self, length: int) -> int:
        """Tokens to generate after a prompt of `length` tokens."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        assert self.max_length is not None
        if self.max_length <= length:
            raise UserError(
                f"max_length must exceed the {length} tokens of the prompt, got {self.max_length}"
            )
        return self.max_length - length

    def _published_budget(self, length: int) -> int:
        """Padding counts towards `max_length`, which the last chunk may overshoot."""
        if self.max_length is None:
            return self._new_tokens(length)
        return max(1, math.ceil((self.max_length - length) / self.patch_size)) * self.patch_size

    def _padding(self, count: int) -> list[int]:
        if count and self.pad_token_id is None:
            raise UserError(
                f"{count} tokens are missing to a whole chunk, and filling them (prompt_alignment="
                '"pad", or a prompt shorter than a chunk) needs config.pad_token_id; set it, or '
                "pass a longer prompt"
            )
        return [self.pad_token_id or 0] * count

    def _fit(self, tokens: list[int], new_tokens: int) -> list[int]:
        """The prompt, or its end where it and what follows exceed the context: whole chunks."""
        size, context = self.patch_size, self.context - (self.start_token_id is not None)
        new_chunks = math.ceil(new_tokens / size)
        if self.alignment == "pad" or self._is_short(tokens):
            num_chunks = math.ceil(len(tokens) / size) + new_chunks
        else:
            num_chunks = math.ceil((len(tokens) + new_tokens) / size)  # they share a chunk
        if num_chunks <= context:
            return tokens
        room = (context - new_chunks) * size
        if room <= 0 or not self.truncate:
            hint = ", or pass truncate=True to drop the beginning of the prompt"
            raise UserError(
                f"the prompt ({len(tokens)} tokens) and {new_tokens} new tokens exceed the context "
                f"of {context * size} tokens; ask for fewer" + (hint if room > 0 else "")
            )
        return tokens[len(tokens) - room :]


def left_aligned(rows: list[list[int]], fill: int, width: int | None = None) -> Tensor:
    """Rows that begin together, ``[B, width]``, filled up at their ends; as wide as the longest."""
    width = max(map(len, rows)) if width is None else width
    ids = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.int64).view(len(rows), width)
