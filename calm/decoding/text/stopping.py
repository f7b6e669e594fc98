"""Where a text ends: tokens that end it, and strings that do."""

from collections.abc import Sequence
from typing import Any

from calm.decoding.text.edges import CONTEXT, text_after
from calm.errors import UserError

__all__ = ["StopStrings", "TextBeforeStops", "end_tokens"]

MARGIN = 8  # tokens beside those of a stop string: some decode to nothing or to half a character


def end_tokens(eos_token_id: int | list[int] | None) -> list[int]:
    """The ids that end a sequence, possibly none."""
    if eos_token_id is None:
        return []
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]


class StopStrings:
    """Strings that end a text wherever they appear in its new part, across chunks too.

    As in transformers, the text ends with the token that completes the string.

    Args:
        strings: one or more, none of them empty.
        tokenizer: with `decode`.

    Raises:
        UserError: no tokenizer, or no string.
    """

    def __init__(self, strings: str | list[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if tokenizer is None:
            raise UserError("stop_strings needs tokenizer=, which turns tokens into text")
        if not self.strings or not all(isinstance(s, str) and s for s in self.strings):
            raise UserError(f"stop_strings must be one or more non-empty strings, got {strings!r}")
        self.tokenizer = tokenizer
        # A token stands for at least one byte, so that no string spans more tokens than its bytes.
        self.span = max(len(string.encode()) for string in self.strings) + MARGIN

    def cut(self, before: list[int], tokens: list[int], fresh: int) -> int | None:
        """How many of `tokens` to keep, whose last `fresh` are new; None if no string is found.

        Args:
            before: the prompt, in which no string is looked for.
            tokens: all that was generated.
            fresh: how many of them were not there at the last call.
        """
        first = len(tokens) - fresh
        start = max(0, first - self.span)
        context = [*before[-CONTEXT:], *tokens[:start]][-CONTEXT:]

        def is_in(end: int) -> bool:
            text = text_after(self.tokenizer, context, tokens[start:end], skip_special_tokens=False)
            return any(string in text for string in self.strings)

        if not is_in(len(tokens)):
            return None
        ends = range(first + 1, len(tokens) + 1)
        return next((end for end in ends if is_in(end)), len(tokens))


class TextBeforeStops:
    """Text as it comes, up to the first stop string, which is not shown.

    Args:
        strings: none of them empty.

    Attributes:
        is_stopped: whether a string has appeared.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.is_stopped = False
        self._held = ""

    def put(self, text: str) -> str:
        """What can be shown after this text: an end that may begin a stop string is held back."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [place for s in self.strings if (place := self._held.find(s)) >= 0]
        self.is_stopped = bool(found)
        shown = min(found) if found else len(self._held) - self._begun()
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def end(self) -> str:
        """What was held back and is no stop string."""
        text, self._held = self._held, ""
        return "" if self.is_stopped else text

    def _begun(self) -> int:
        """Characters of the longest end of the text that begins a stop string."""
        longest = max((len(s) - 1 for s in self.strings), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if self._is_begin(self._held[-n:])), 0)

    def _is_begin(self, end: str) -> bool:
        return any(string.startswith(end) for string in self.strings)
