"""Text of tokens that follow others, decoded with what stands before them.

Tokens decoded alone lose what their neighbours decide: sentencepiece-like tokenizers drop the space
before the first word, and a character may begin in one chunk and end in the next.
"""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, TextIO

from transformers.generation.streamers import BaseStreamer

__all__ = ["TextStream", "text_after"]

CONTEXT = 16  # tokens that are decoded before an edge where all of them would take long
UNFINISHED = "\ufffd"  # what a part of a character decodes to
MOST_UNFINISHED = 3  # tokens: all but the last byte of a character


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
    shown, whole = (
        tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        for ids in (before, [*before, *tokens])
    )
    common = takewhile(lambda pair: pair[0] == pair[1], zip(shown, whole, strict=False))
    return whole[sum(1 for _ in common) :]


class TextStream(BaseStreamer):
    """A streamer that prints every token's text as soon as its characters are whole.

    Args:
        tokenizer: with `decode`.
        file: to print to, by default standard output.
    """

    def __init__(self, tokenizer: Any, file: TextIO | None = None) -> None:
        self.tokenizer = tokenizer
        self.file = file or sys.stdout
        self._shown: list[int] = []  # the last tokens that were printed
        self._pending: list[int] = []
        self._has_begun = False

    def put(self, value: Any) -> None:
        """Print the text of these tokens, a tensor of any shape."""
        self._has_begun = True
        self._pending += value.flatten().tolist()
        for held in range(MOST_UNFINISHED + 1):
            ready = self._pending[: len(self._pending) - held]
            if not text_after(self.tokenizer, self._shown, ready).endswith(UNFINISHED):
                self._print(len(ready))
                return
        self._print(len(self._pending))  # no character: the model wrote other bytes

    def end(self) -> None:
        """Print what is left and end the line, if anything came."""
        self._print(len(self._pending))
        if self._has_begun:
            self.file.write("\n")
            self.file.flush()

    def _print(self, count: int) -> None:
        tokens, self._pending = self._pending[:count], self._pending[count:]
        self.file.write(text_after(self.tokenizer, self._shown, tokens))
        self.file.flush()
        self._shown = [*self._shown, *tokens][-CONTEXT:]
