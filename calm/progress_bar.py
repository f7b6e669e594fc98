"""Progress of long work: a bar at a terminal, lines in a file."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["progress_bar"]

SECONDS = 30.0  # between two lines, and before the first


class _Lines:
    """A stream on which each state of a bar is a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Tqdm on standard error; where that is no terminal, a line each half minute at most.

    Work that ends within half a minute then writes nothing.

    Args:
        iterable: what is worked on; None where the caller updates.
        options: of tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    pace = {"delay": SECONDS, "mininterval": SECONDS, "ncols": 0, "ascii": True}
    return tqdm(iterable, **{"file": _Lines(sys.stderr), **pace, **options})
