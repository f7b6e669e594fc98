"""What the compiler makes of every kernel, for GPUs that this machine need not have.

``python -m calm_kernels.compile_report`` compiles all configurations for all targets and prints
registers, spilled bytes, shared memory, warp instructions a row (a position, at the reference
size), the time their issue takes and the share of it that memory traffic and matmuls alone need. It
exits with 1 if a kernel spills, exceeds shared memory or its instruction budget, or does not use
tensor cores where it should. With ``CALM_KERNELS_OVERLAP=1`` kernels of a decode step are those
that overlap (`calm_kernels.overlap`), which must wait before they access memory.

The issue time assumes that every scheduler issues in every cycle; plan on 65 to 80 % of that rate.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from calm_kernels.backend import is_interpreted
from calm_kernels.compiling.configuration import Configuration, compile_kernel
from calm_kernels.compiling.configurations import configurations
from calm_kernels.compiling.inspection import Cost, inspect_kernel
from calm_kernels.compiling.targets import TARGETS, Target

__all__ = ["Row", "main", "report"]


@dataclass(frozen=True)
class Row:
    """One configuration on one target."""

    configuration: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: int  # warp instructions a row
    budget: int | None
    issue_us: float  # of all rows
    floor_us: float  # their memory traffic, or their matmuls
    problems: tuple[str, ...]

    @property
    def floor_share(self) -> float:
        """How much of the larger of issue and floor time is unavoidable."""
        return self.floor_us / max(self.issue_us, self.floor_us)


def _problems(
    configuration: Configuration, target: Target, cost: Cost, instructions: int,
    budget: int | None, *, has_overlap: bool,
) -> Iterator[str]:  # fmt: skip
    """What is wrong with a compiled kernel."""
    if cost.spilled_bytes:
        yield f"spills {cost.spilled_bytes} bytes"
    if cost.shared_bytes > target.shared_limit:
        yield f"shared memory {cost.shared_bytes} > {target.shared_limit}"
    if budget is not None and instructions > budget:
        yield f"{instructions} instructions > budget {budget}"
    needed = configuration.needed.get(target.name)
    if needed and not any(name.startswith(needed) for name in cost.mnemonics):
        yield f"no {needed} instruction"
    if has_overlap and not cost.waits_first:
        yield "memory is accessed before the wait for the previous kernel"


def measure(configuration: Configuration, target: Target) -> Row:
    """Compile one configuration for one target and judge it."""
    compiled, constants = compile_kernel(configuration, target)
    cost = inspect_kernel(compiled, configuration.trips(constants))
    programs = configuration.num_programs(constants) / configuration.rows
    instructions = round(cost.instructions * cost.num_warps * programs)
    budget = None
    if configuration.budget is not None:
        budget = round(configuration.budget * target.budget_scale)
    floor = max(
        configuration.bytes_per_row / target.bandwidth,
        configuration.flops_per_row / target.tensor_rate,
    )
    problems = _problems(
        configuration, target, cost, instructions, budget,
        has_overlap=constants.get("OVERLAP", False),
    )  # fmt: skip
    return Row(
        configuration=configuration.name,
        target=target.name,
        registers=cost.registers,
        spilled_bytes=cost.spilled_bytes,
        shared_bytes=cost.shared_bytes,
        num_warps=cost.num_warps,
        instructions=instructions,
        budget=budget,
        issue_us=configuration.rows * instructions / target.issue_rate * 1e6,
        floor_us=configuration.rows * floor * 1e6,
        problems=tuple(problems),
    )


def report(targets: Iterable[str], prefix: str = "") -> Iterable[Row]:
    """Rows of all configurations whose name starts with `prefix`, target by target."""
    found = list(configurations())
    for name in targets:
        for configuration in found:
            is_launched = not configuration.targets or name in configuration.targets
            if is_launched and configuration.name.startswith(prefix):
                yield measure(configuration, TARGETS[name])


_COLUMNS = (
    "configuration", "target", "registers", "spill B", "shared B", "warps", "instr/row",
    "budget", "issue us", "floor us", "floor",
)  # fmt: skip
_LAYOUT = "{:<44} {:<7} {:>9} {:>7} {:>8} {:>5} {:>9} {:>6} {:>8} {:>8} {:>5}  {}"


def _line(row: Row) -> str:
    return _LAYOUT.format(
        row.configuration, row.target, row.registers, row.spilled_bytes, row.shared_bytes,
        row.num_warps, row.instructions, row.budget or "-", f"{row.issue_us:.1f}",
        f"{row.floor_us:.1f}", f"{row.floor_share:.0%}", "; ".join(row.problems),
    ).rstrip()  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m calm_kernels.compile_report")
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="may be repeated; default: all"
    )
    parser.add_argument("--op", default="", help="only configurations that start with this")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    arguments = parser.parse_args(argv)
    if is_interpreted():
        parser.error("kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    if not any(found.name.startswith(arguments.op) for found in configurations()):
        names = ", ".join(found.name for found in configurations())
        parser.error(f"--op: no configuration starts with {arguments.op!r}; there are {names}")
    write = sys.stdout.write
    rows = []
    if not arguments.json:
        write(_LAYOUT.format(*_COLUMNS, "").rstrip() + "\n")
    for row in report(arguments.target or TARGETS, arguments.op):
        rows.append(row)
        if not arguments.json:
            write(_line(row) + "\n")
            sys.stdout.flush()
    if arguments.json:
        write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
