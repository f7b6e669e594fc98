"""Work on many rows in blocks whose intermediates stay in cache."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["WORKING_SET", "in_row_blocks"]

# Elements of the largest intermediate of a block: a few MiB, about what a core's own cache holds.
WORKING_SET = 1 << 19

Outputs = tuple[Tensor | None, ...]


def in_row_blocks(compute: Callable[[slice], Outputs], num_rows: int, elements_per_row: int) -> Any:
    """`compute` of blocks of rows: a tuple of its outputs ``[r, ...]``, joined along the rows.

    Args:
        compute: outputs of one slice; an output is None for every slice or for none.
        num_rows: R; without rows `compute` still runs once, on the empty slice.
        elements_per_row: size of the largest intermediate of a row, which sets the step.
    """
    step = max(1, WORKING_SET // max(1, elements_per_row))
    if num_rows <= step:
        return compute(slice(0, num_rows))
    joined: Outputs = ()
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        parts = compute(rows)
        if not joined:
            joined = tuple(
                None if part is None else part.new_empty(num_rows, *part.shape[1:])
                for part in parts
            )
        for whole, part in zip(joined, parts, strict=True):
            if whole is not None and part is not None:
                whole[rows] = part
    return joined
