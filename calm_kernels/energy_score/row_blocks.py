"""Work on many rows in blocks of bounded size.

On a CPU the intermediates of a block stay in a core's cache. On a GPU a block is as large as memory
is cheap: there every block costs its launches again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_row_blocks", "working_set"]

# Elements of the largest intermediate of a block: about what a core's own cache holds, and 512 MiB
# of float32 on any other device.
CPU_WORKING_SET, DEVICE_WORKING_SET = 1 << 19, 1 << 27

Outputs = tuple[Tensor | None, ...]


def working_set(device: torch.device) -> int:
    """Elements that the largest intermediate of a block may hold on `device`."""
    return CPU_WORKING_SET if device.type == "cpu" else DEVICE_WORKING_SET


def in_row_blocks(
    compute: Callable[[slice], Outputs],
    num_rows: int,
    elements_per_row: int,
    device: torch.device,
) -> Any:
    """`compute` of blocks of rows: a tuple of its outputs ``[r, ...]``, joined along the rows.

    Args:
        compute: outputs of one slice; an output is None for every slice or for none.
        num_rows: R; without rows `compute` still runs once, on the empty slice.
        elements_per_row: size of the largest intermediate of a row, which sets the step.
        device: where it runs, which sets the size of a block.
    """
    step = max(1, working_set(device) // max(1, elements_per_row))
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
