"""Where a text ends: tokens that end it, and strings that do."""

from typing import Any

from calm.decoding.text.edges import CONTEXT, text_after
from calm.errors import UserError

__all__ = ["StopStrings", "end_tokens"]

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
