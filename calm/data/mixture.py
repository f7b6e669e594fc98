"""Texts that are mixed: their names, their weights, and how much of each an epoch reads.

A weight is a share of the blocks of an epoch. No block is read twice in one: an epoch ends where
the text that is scarcest for its weight has been read once. Of another text the next epoch reads
what this one has left, see `calm.data.prepared`.
"""

import re
from collections.abc import Collection, Sequence
from fractions import Fraction

from calm.errors import UserError

__all__ = ["epoch_shares", "parse_sources", "parse_weights"]

NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes part of file names
TOLERANCE = Fraction(1, 10**6)  # of the sum of weights, for 0.333333


def parse_sources(words: Sequence[str]) -> dict[str, str]:
    """Names and texts of words such as ``web=web/*.jsonl``.

    Raises:
        UserError: no name, a name of other characters than letters, digits, ``_`` and ``-``, no
            text, or one name twice.
    """
    sources: dict[str, str] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not NAME.fullmatch(name) or not text.strip():
            raise UserError(
                "source must be NAME=TEXT, the name of letters, digits, _ and -, as in "
                f"web='web/*.jsonl'; got {word!r}"
            )
        if name in sources:
            raise UserError(f"source: {name} is named twice ({sources[name]!r} and {text!r})")
        sources[name] = text
    return sources


def parse_weights(text: str, names: Collection[str]) -> dict[str, Fraction]:
    """The weight of each of `names` in a text such as ``web=0.7,code=0.3``.

    Raises:
        UserError: a weight that is no positive number, weights that do not sum to one, a source
            without weight or a weight without source.
    """
    weights: dict[str, Fraction] = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        try:
            weight = Fraction(value.strip())
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"mixture must give a positive number to each source, as in web=0.7,code=0.3; got "
                f"{word.strip()!r}"
            ) from None
        if weight <= 0:
            raise UserError(f"mixture: weights must be positive, got {name}={value}")
        if name not in names or name in weights:
            reason = "is given twice" if name in weights else "is no source"
            raise UserError(f"mixture: {name} {reason} (sources: {', '.join(names)})")
        weights[name] = weight
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"mixture: no weight for {', '.join(missing)}; leave out what is not mixed")
    total = sum(weights.values(), Fraction())
    if abs(total - 1) > TOLERANCE:
        raise UserError(f"mixture: weights must sum to 1, got {float(total):g} ({text})")
    return {name: weights[name] / total for name in names}


def epoch_shares(
    sizes: Sequence[int], weights: Sequence[Fraction] | None, limit: int | None = None
) -> list[int]:
    """How many blocks of each text an epoch reads, at most all of it.

    n_i = floor(w_i * T) with T = min_i size_i / w_i, or `limit` if that is less.

    Args:
        sizes: blocks of each text.
        weights: of each text, summing to one; None to read all of every text.
        limit: blocks of an epoch at most. Without weights the first ones.
    """
    if weights is None:
        shares, left = [], sum(sizes) if limit is None else limit
        for size in sizes:
            shares.append(min(size, left))
            left -= shares[-1]
        return shares
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    if limit is not None:
        total = min(total, Fraction(limit))
    return [int(weight * total) for weight in weights]
