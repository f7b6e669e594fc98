"""The rewards that are built in, as functions of contexts and continuations."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from calm.errors import UserError

__all__ = ["Length", "Pattern", "Repetition"]

NGRAM = 4  # of `Repetition`, where the flag names none


@dataclass(frozen=True)
class Length:
    """Tokens of a continuation before the end of the text.

    Attributes:
        end: id of the token that ends a text; None where there is none.
    """

    end: int | None

    def __call__(
        self, contexts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> list[float]:
        """A number for each, 0 to K."""
        return [
            float(ids.index(self.end) if self.end in ids else len(ids)) for ids in continuations
        ]


@dataclass(frozen=True)
class Repetition:
    """Minus the share of a continuation's tokens that end an n-gram which was there before.

    Tokens after the first end token only fill the chunk and count nowhere.

    Attributes:
        order: n.
        end: id of the token that ends a text; None where there is none.
    """

    order: int
    end: int | None

    @classmethod
    def parse(cls, text: str, end: int | None) -> "Repetition":
        """What follows ``repetition:``, n; 4 for nothing."""
        if text and not (text.isascii() and text.isdigit() and int(text)):
            raise UserError(f"reward: repetition:N takes a whole number of tokens, got {text!r}")
        return cls(int(text or NGRAM), end)

    def __call__(
        self, contexts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> list[float]:
        """A number for each, -1 to 0."""
        return [
            self._of(context, ids) for context, ids in zip(contexts, continuations, strict=True)
        ]

    def _of(self, context: tuple[int, ...], ids: tuple[int, ...]) -> float:
        if self.end in ids:
            ids = ids[: ids.index(self.end) + 1]
        whole, repeated, seen = context + ids, 0, set()
        for end in range(self.order, len(whole) + 1):
            gram = whole[end - self.order : end]
            repeated += gram in seen and end > len(context)
            seen.add(gram)
        return -repeated / len(ids)


@dataclass(frozen=True)
class Pattern:
    """1 where a match of a pattern ends within the continuation, 0 elsewhere.

    Attributes:
        pattern: may begin in the context, and never matches nothing.
    """

    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """What follows ``regex:``."""
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UserError(f"reward: regex:{text} is no regular expression ({error})") from error
        if pattern.search(""):
            raise UserError(
                f"reward: regex:PATTERN must not match the empty text, which every text contains; "
                f"got {text!r}"
            )
        return cls(pattern)

    def __call__(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """A number for each, 0 or 1."""
        return [
            float(self._ends_in(context, text))
            for context, text in zip(contexts, continuations, strict=True)
        ]

    def _ends_in(self, context: str, text: str) -> bool:
        """Of each place where a match begins the first one counts; matches may overlap."""
        whole = context + text
        match = self.pattern.search(whole) if text else None
        while match and match.end() <= len(context):
            match = self.pattern.search(whole, match.start() + 1)
        return match is not None
