"""``python -m benchmarks.gpu.run``: kernels against their baselines on this GPU.

Parity is asserted before anything is timed. Floors are for the copy and the GEMM that this device
was measured at when the run began. Results go to benchmarks/results/<device>.json with
versions and commit, after every row. What fails is a row that says why; the others go on.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.device_time import measure, measure_on_cpu
from benchmarks.gpu.environment import environment
from benchmarks.gpu.work import Measurement, Work, failure, named, row_of, write
from calm_kernels.backend import OPERATIONS

RESULTS = Path(__file__).resolve().parents[1] / "results"


def operations() -> dict[str, ModuleType]:
    """The module of every operation that has one here."""
    names = {name: f"benchmarks.gpu.{name}" for name in OPERATIONS}
    return {
        name: importlib.import_module(path)
        for name, path in names.items()
        if importlib.util.find_spec(path) is not None
    }


def measured(
    works: Iterator[Work], ceilings: Ceilings | None, timer: Callable[[Work], Measurement]
) -> Iterator[dict[str, Any]]:
    """The rows of these works, timed one after the other. A row that failed holds its error; where
    the inputs or their parity failed, it is the last.
    """
    while True:
        work = None
        try:
            work = next(works, None)
            if work is None:
                return
            if work.missing:
                row = named(work) | {"missing": work.missing}
            else:
                row = row_of(work, timer(work), ceilings)
        except Exception as error:
            row = (named(work) if work else {}) | failure(error)
            torch.cuda.empty_cache()  # perhaps there was too little memory
        yield row


def line(row: dict[str, Any]) -> str:
    """One row on the terminal."""
    if "missing" in row:
        return f"{row['operation']}: {row['work']}, {row['name']}: {row['missing']}"
    if "error" in row:
        return f"{row['operation']}: {row['work']}, {row['name']}: FAILED, {row['error']}"
    share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%} of floor"
    note = "" if row["is_captured"] else "not captured"
    sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    left = f"{row['operation']}: {row['work']}, {row['name']}"
    return f"{left:<80} {row['median_ms']:9.4f} ms {share:>14} {note:<12} {sizes}".rstrip()


def chosen(module: ModuleType, arguments: argparse.Namespace) -> list[Any]:
    """The shapes of an operation that the flags ask for."""
    shapes, quick = module.SHAPES, module.QUICK
    if arguments.tiny:
        shapes, quick = module.TINY, module.TINY[:1]
    if arguments.quick:
        return quick
    return [shape for shape in shapes if shape not in quick] if arguments.sweep else shapes


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    modules = operations()
    parser = make_parser(__doc__, RESULTS)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="the reference shapes alone")
    sizes.add_argument("--sweep", action="store_true", help="the other shapes alone")
    parser.add_argument("--compiled", action="store_true", help="baselines of torch.compile alone")
    parser.add_argument("--op", action="append", choices=modules, help="may be repeated")
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    found, ceilings = environment(device), measure_ceilings(device)
    timer = measure_on_cpu if device == "cpu" else measure
    results: dict[str, Any] = {"environment": found, "ceilings": asdict(ceilings), "rows": []}
    path = arguments.output / f"{found['device'].lower().replace(' ', '-')}.json"
    for name in arguments.op or modules:
        for shape in chosen(modules[name], arguments):
            unknown = {"operation": name, "work": "", "name": "", "shape": asdict(shape)}
            works = modules[name].works([shape], device, compiled=arguments.compiled)
            for row in measured(works, ceilings, timer):
                results["rows"].append(unknown | row)
                print(line(results["rows"][-1]), flush=True)
                write(path, results)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
