"""Ranges of numbers that flags take: declared beside each flag, checked for all in one way."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from calm.errors import UserError

__all__ = [
    "ANY",
    "FRACTION",
    "NOT_NEGATIVE",
    "PERCENTAGE",
    "POSITIVE",
    "SEED",
    "Range",
    "at_least",
    "name_first",
    "number",
]


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds.

    Attributes:
        low: least number, itself allowed unless `is_open`.
        high: greatest number, itself allowed unless `is_half_open`.
        is_open: excludes `low`.
        is_half_open: excludes `high`.
        also: a number outside that is allowed too, with a meaning of its own.
    """

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    is_half_open: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        is_above = value > self.low if self.is_open else value >= self.low
        is_below = value < self.high if self.is_half_open else value <= self.high
        return (is_above and is_below) or value == self.also

    def __str__(self) -> str:
        if self.high < math.inf:
            text = f"in {'(' if self.is_open else '['}{self.low}, {self.high}"
            text += ")" if self.is_half_open else "]"
        elif self.low > -math.inf:
            text = f"{'above' if self.is_open else 'at least'} {self.low}"
        else:
            text = "a finite number"
        return text if self.also is None else f"{text}, or {self.also}"

    def check(self, name: str, value: float) -> None:
        """Raise a `UserError` that names `name` if `value` lies outside."""
        if value not in self:
            raise UserError(f"{name} must be {self}, got {value}")


def at_least(low: float, also: float | None = None) -> Range:
    """Numbers from `low` on."""
    return Range(low, also=also)


ANY = Range()
POSITIVE = Range(0, is_open=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1, is_half_open=True)
PERCENTAGE = Range(0, 100, is_half_open=True)
SEED = Range(0, 2**32 - 1)


def name_first(message: str) -> str:
    """An error of argparse about a range, beginning with the flag's name."""
    return re.sub(r"^argument (--[\w-]+)(?:/[\w-]+)*: must be", r"\1 must be", message)


def number(kind: type, allowed: Range) -> Callable[[str], float]:
    """A type for argparse: an int or a float within a range."""

    def read(text: str) -> float:
        value = kind(text)
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read
