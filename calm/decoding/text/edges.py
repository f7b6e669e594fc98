"""Text of tokens that follow others, decoded with what stands before them.

Tokens decoded alone lose what their neighbours decide: sentencepiece-like tokenizers drop the space
before the first word, and a character may begin in one chunk and end in the next.
"""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, TextIO

from transformers.generation.streamers import BaseStreamer

__all__ = ["TextPieces", "TextStream", "TokenRecord", "text_after", "texts_after"]

CONTEXT = 16  # tokens that are decoded before an edge where all of them would take long
UNFINISHED = "\ufffd"  # what a part of a character decodes to
MOST_UNFINISHED = 3  # of these signs: all but the last byte of a character
MOST_UNCLEAR = 64  # of these signs in a row, before a character is no longer hoped for


def text_after(
    tokenizer: Any,
    before: Sequence[int],
    tokens: Sequence[int],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """What `tokens` add to the text of `before`.

    Args:
        tokenizer: with `decode`.
        before: ids that stand before them, possibly none; the last ones are enough.
        tokens: ids.
        skip_special_tokens: leave special tokens out of the text.

    Returns: their text, from the first character that is not whole or not there without them.
    """
    (text,) = texts_after(tokenizer, before, [tokens], skip_special_tokens=skip_special_tokens)
    return text


def texts_after(
    tokenizer: Any,
    before: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    skip_special_tokens: bool = True,
) -> list[str]:
    """`text_after` of each continuation of the same tokens, which are decoded once."""

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    shown = decode(before)
    found = []
    for tokens in continuations:
        whole = decode([*before, *tokens])
        common = takewhile(lambda pair: pair[0] == pair[1], zip(shown, whole, strict=False))
        found.append(whole[sum(1 for _ in common) :])
    return found


class TextPieces:
    """Text of tokens as they come, in whole characters.

    Args:
        tokenizer: with `decode`.
        before: ids that stand before the first token.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._before = list(before[-CONTEXT:])  # tokens whose text was returned
        self._pending: list[int] = []  # those after them
        self._num_shown = 0  # characters of theirs that were returned

    def put(self, tokens: Sequence[int]) -> str:
        """What can be shown after these tokens; part of a character waits for its other bytes."""
        self._pending += tokens
        text = text_after(self.tokenizer, self._before, self._pending)
        unclear = len(text) - len(text.rstrip(UNFINISHED))
        if not 0 < unclear <= MOST_UNCLEAR:
            return self._take(text)
        # Bytes that are no character show as the same sign; the last few may become one yet.
        begin, self._num_shown = self._num_shown, len(text) - min(unclear, MOST_UNFINISHED)
        return text[begin : self._num_shown]

    def end(self) -> str:
        """What is left, which may end in a part of a character."""
        return self._take(text_after(self.tokenizer, self._before, self._pending))

    def _take(self, text: str) -> str:
        """The rest of the text of all pending tokens, which are shown then."""
        self._before = [*self._before, *self._pending][-CONTEXT:]
        begin, self._num_shown, self._pending = self._num_shown, 0, []
        return text[begin:]


class TextStream(BaseStreamer):
    """A streamer that prints every token's text as soon as its characters are whole.

    Args:
        tokenizer: with `decode`.
        file: to print to, by default standard output.
    """

    def __init__(self, tokenizer: Any, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self._pieces = TextPieces(tokenizer)
        self._has_begun = False

    def put(self, value: Any) -> None:
        """Print the text of these tokens, a tensor of any shape."""
        self._has_begun = True
        self._print(self._pieces.put(value.flatten().tolist()))

    def end(self) -> None:
        """Print what is left and end the line, if anything came."""
        self._print(self._pieces.end() + ("\n" if self._has_begun else ""))

    def _print(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


class TokenRecord(BaseStreamer):
    """A streamer that keeps what it receives.

    Attributes:
        prompt: ids of the prompt, without what was dropped of one that is too long.
        new: ids of all new tokens so far.
    """

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.new: list[int] = []
        self._has_begun = False

    def put(self, value: Any) -> None:
        """Keep these tokens, a tensor of any shape; the first are the prompt."""
        (self.new if self._has_begun else self.prompt).extend(value.flatten().tolist())
        self._has_begun = True

    def end(self) -> None:
        """Nothing is left to do."""
