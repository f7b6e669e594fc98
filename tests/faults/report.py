"""What a case of `tests.faults` came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Result", "choose"]

Case = TypeVar("Case")


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        case: what was done.
        outcome: how it ended, in a few words; the report counts equal ones.
        ok: whether that is right.
        detail: for a case that is not, what helps to find out why.
    """

    case: str
    outcome: str
    ok: bool
    detail: str = ""


def choose(cases: Sequence[Case], count: int | None) -> list[Case]:
    """`count` of the cases, evenly spread; all of them where it is None or larger."""
    if count is None or count >= len(cases):
        return list(cases)
    return [cases[index * len(cases) // count] for index in range(count)]
