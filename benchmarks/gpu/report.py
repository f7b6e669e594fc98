"""Tables of a campaign's ``report.json``: what was measured, and what failed.

Every part may be missing: a stage that did not run, a row that holds an error, a row that was cut
short. Whatever is unknown is "–"; needs the standard library alone.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.gpu.modelled import modelled_table
from benchmarks.tables import emphasised, table

__all__ = ["device_name", "kernel_rows", "rows_of", "tables"]

Report = dict[str, Any]
Row = dict[str, Any]
MEBIBYTE, GIBIBYTE = 2.0**20, 2.0**30
UNKNOWN = "–"
NOTHING = "Not measured."


def rows_of(report: Report, *names: str) -> list[Row]:
    """Rows of the stages whose first word is one of these names."""
    return [
        row
        for name in names
        for stage in report.get("stages", ())
        if str(stage.get("name")).split(" ")[0] == name
        for row in stage.get("rows") or ()
    ]


def kernel_rows(report: Report) -> list[Row]:
    """What operations take: reference sizes, compiled rivals, sweeps."""
    return rows_of(report, "kernels", "compiled", "sweep")


def device_name(report: Report) -> str:
    """The device as its driver names it."""
    rows = rows_of(report, "environment")
    return str(rows[0].get("device", "unknown device")) if rows else "unknown device"


def number(row: Row, key: str, digits: int = 3, *, scale: float = 1.0, unit: str = "") -> str:
    """A number of a row divided by `scale`, "–" without one."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return UNKNOWN
    return f"{value / scale:.{digits}f}{unit}"


def share(row: Row, key: str) -> str:
    """A part of one as a percentage."""
    return number(row, key, 0, scale=0.01, unit=" %")


def milliseconds(row: Row, key: str) -> str:
    """A time, or why there is none."""
    if "error" in row:
        return f"failed: {str(row['error'])[:60]}"
    return str(row["missing"]) if "missing" in row else number(row, key)


def ratio(ours: Row, theirs: Row, key: str) -> str:
    """Theirs over ours, bold where ours takes less."""
    mine, other = ours.get(key), theirs.get(key)
    if not mine or not other:
        return UNKNOWN
    return emphasised(f"{other / mine:.2f}x", other > mine)


def tables(report: Report) -> dict[str, str]:
    """Every table by the name of its place."""
    return {
        "gpu-environment": environment_table(report),
        "gpu-kernels": kernel_table(rows_of(report, "kernels", "compiled")),
        "gpu-sweeps": kernel_table(rows_of(report, "sweep")),
        "gpu-decoding": decoding_table(rows_of(report, "decoding")),
        "gpu-training": training_table(rows_of(report, "training_step")),
        "gpu-longest": longest_table(report),
        "gpu-counters": counter_table(rows_of(report, "ncu")),
        "gpu-modelled": modelled_table(kernel_rows(report)),
        "gpu-stages": stage_table(report),
    }


def environment_table(report: Report) -> str:
    """The device, and the ceilings that shares are of."""
    found = [
        (
            str(row.get("device")),
            number(row, "bandwidth", 2, scale=1e12),
            number(row, "tensor_rate", 0, scale=1e12),
            *(str(row.get(name)) for name in ("torch", "triton", "cuda")),
            str(row.get("commit"))[:10],
        )
        for row in rows_of(report, "environment")
    ]
    columns = ("device", "copy, TB/s", "bf16 GEMM, TFLOP/s", "torch", "Triton", "CUDA", "commit")
    return table(columns, found) if found else NOTHING


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same operation, work and sizes, in order; the first of each name counts."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        key = json.dumps([row.get("operation"), row.get("work"), row.get("shape")])
        groups.setdefault(key, {}).setdefault(str(row.get("name")), row)
    return [list(group.values()) for group in groups.values()]


def kernel_table(rows: Sequence[Row]) -> str:
    """A line for each that computes what our first kernel of a group does."""
    found: list[Sequence[str]] = []
    for group in _groups(rows):
        mine = [row for row in group if str(row.get("name")).startswith("triton")]
        ours = mine[0] if mine else {}
        others = [row for row in group if row is not ours] or [{}]
        for row in others:
            of = ours or row
            found.append(
                (
                    f"{of.get('operation')}: {of.get('work')}",
                    ", ".join(f"{k} {v}" for k, v in (of.get("shape") or {}).items()),
                    milliseconds(ours, "median_ms"),
                    share(ours, "share_of_floor"),
                    str(row.get("name") or UNKNOWN),
                    milliseconds(row, "median_ms"),
                    ratio(ours, row, "median_ms"),
                    f"{number(ours, 'peak_memory_bytes', 1, scale=MEBIBYTE)} / "
                    f"{number(row, 'peak_memory_bytes', 1, scale=MEBIBYTE)}",
                )
            )
    columns = (
        "work", "sizes", "ours, ms", "of the ceiling", "beside it", "its ms", "ratio",
        "peak memory, ours / its, MiB",
    )  # fmt: skip
    return table(columns, found) if found else NOTHING


def decoding_table(rows: Sequence[Row]) -> str:
    """A line for each that writes texts; ours with its graph."""
    cases: dict[tuple[Any, Any], dict[str, Row]] = {}
    for row in rows:
        case = row.get("batch_size"), row.get("temperature")
        cases.setdefault(case, {}).setdefault(str(row.get("name")), row)
    found = []
    for case in cases.values():
        graph, ours = case.pop("graph", {}), case.get("ours", {})
        for name, row in case.items():
            found.append(
                (
                    name,
                    number(row, "batch_size", 0),
                    number(row, "temperature", 1),
                    milliseconds(row, "chunk_ms"),
                    number(row, "tokens_per_second", 0),
                    UNKNOWN if row is ours else ratio(ours, row, "chunk_ms"),
                    share(row, "share_of_floor"),
                    number(graph if row is ours else {}, "nodes", 0),
                    number(graph if row is ours else {}, "device_ms"),
                )
            )
    columns = ("who", "batch", "T", "ms a chunk", "tokens/s", "ratio to ours", "of the floor",
               "nodes of the graph", "their ms")  # fmt: skip
    return table(columns, found) if found else NOTHING


def training_table(rows: Sequence[Row]) -> str:
    """A line for each variant of the step."""
    ours = next((row for row in rows if row.get("name") == "ours"), {})
    found = [
        (
            str(row.get("name")),
            milliseconds(row, "median_ms"),
            ratio(ours, row, "median_ms"),
            number(row, "tokens_per_second", 0),
            number(row, "mfu", 1, scale=0.01, unit=" %"),
            number(row, "peak_memory_bytes", 1, scale=GIBIBYTE),
            number(row, "launches", 0),
            number(row, "waits", 0),
        )
        for row in rows
    ]
    columns = ("step", "ms", "ratio to ours, eager", "tokens/s", "MFU", "peak memory, GiB",
               "launches", "waits")  # fmt: skip
    return table(columns, found) if found else NOTHING


def longest_table(report: Report, most: int = 8) -> str:
    """The kernels that take longest in decode graphs and training steps."""
    found = [
        (label, str(kernel.get("name")), number(kernel, "count", 0), number(kernel, "ms"))
        for label, row in _profiled(report)
        for kernel in (row.get("longest_kernels") or ())[:most]
    ]
    return table(("of", "kernel", "launches", "ms"), found) if found else NOTHING


def _profiled(report: Report) -> Iterator[tuple[str, Row]]:
    for row in rows_of(report, "decoding"):
        yield f"decode step, batch {row.get('batch_size')}, T = {row.get('temperature')}", row
    for row in rows_of(report, "training_step"):
        yield f"training step, {row.get('name')}", row


def counter_table(rows: Sequence[Row]) -> str:
    """A line for each kernel that Nsight Compute saw."""
    found = [
        (
            str(row.get("case")),
            str(row.get("kernel", UNKNOWN))[:60],
            milliseconds(row, "") if "error" in row else number(row, "device_ns", 1, scale=1e3),
            number(row, "bytes_read", 1, scale=1e6),
            number(row, "bytes_written", 1, scale=1e6),
            *(
                number(row, f"{name}_percent", 0, unit=" %")
                for name in ("memory", "occupancy", "tensor")
            ),
            number(row, "registers", 0),
        )
        for row in rows
    ]
    columns = ("case", "kernel", "µs", "MB read", "MB written", "of memory's peak", "occupancy",
               "tensor cores busy", "registers")  # fmt: skip
    return table(columns, found) if found else NOTHING


def stage_table(report: Report) -> str:
    """The stages that did not pass, and rows that failed in those that did."""
    stages, found = report.get("stages", ()), []
    if not stages:
        return NOTHING
    for stage in stages:
        wrong = sum("error" in row for row in stage.get("rows") or ())
        if stage.get("status") != "passed" or wrong:
            last = [line for line in stage.get("last_lines") or () if line.strip()][-1:]
            status = f"{stage.get('status')} {stage.get('detail', '')}".strip()
            found.append((str(stage.get("name")), status, str(wrong), "".join(last)[:120]))
    passed = sum(stage.get("status") == "passed" for stage in stages)
    summary = f"{passed} of {len(stages)} stages passed."
    if not found:
        return summary
    return f"{summary}\n\n" + table(
        ("stage", "how it ended", "rows that failed", "last line"), found
    )
