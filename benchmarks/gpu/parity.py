"""``python -m benchmarks.gpu.parity --op NAME``: one operation against its baselines, untimed.

The first thing to run on a new GPU, a process an operation: a kernel that faults takes its process
with it.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.run import operations
from benchmarks.gpu.work import write

__all__ = ["main", "rows"]


def rows(name: str, shapes: Sequence[Any], device: str) -> Iterator[dict[str, Any]]:
    """A row for everything that the operation's benchmark would time, which was run once.

    Parity is asserted by the benchmark's `works`.
    """
    for work in operations()[name].works(shapes, device=device):
        if work.missing:
            continue
        result = work.run(0)
        values = result if isinstance(result, (tuple, list)) else [result]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise AssertionError(f"{work.operation}: {work.label}, {work.name}: not finite")
        yield {"operation": work.operation, "work": work.label, "name": work.name, "equal": True}


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--op", required=True, choices=operations())
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    module, found = operations()[arguments.op], []
    shapes = module.TINY if arguments.tiny else module.QUICK
    for row in rows(arguments.op, shapes[:1], device):
        found.append(row)
        print(row, flush=True)
        write(arguments.output / "parity.json", {"rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
