"""``python -m benchmarks.gpu.counters``: hardware counters of four kernels, read by Nsight Compute.

Each is run once before the call that counts. A row a kernel launch: time on the device, bytes that
moved through device memory and the share of its peak, warps that were resident, registers, the
share of the cycles in which the tensor cores worked. Clocks are left alone.
"""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.run import operations
from benchmarks.gpu.work import MAX_ERROR, write

__all__ = ["CASES", "main", "parse", "run_case"]

SECONDS, MAX_LAUNCHES = 60, 50
# Operation, name of the work, sizes other than the reference.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "energy score": ("energy_score", "triton, analytic", {}),
    "energy head layer": (
        "energy_head",
        "triton",
        {"rows": 1, "num_samples": 200, "num_blocks": 1, "is_training": False},
    ),
    "linear argmax, few rows": ("linear_argmax", "triton", {"rows": 4}),
    "linear argmax, 800 rows": ("linear_argmax", "triton", {"rows": 800}),
}
METRICS = {
    "gpu__time_duration.sum": "device_ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
}
COMMAND = (
    "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
    "--profile-from-start", "off", "--launch-count", str(MAX_LAUNCHES),
    "--metrics", ",".join(METRICS),
)  # fmt: skip
DENIED = "ERR_NVGPUCTRPERM"
ADVICE = (
    f"{DENIED}: this user may not read the counters; run as root, or have the driver loaded with "
    "NVreg_RestrictProfilingToAdminUsers=0"
)


def run_case(name: str, device: str) -> None:
    """Run a case twice, the second time between the marks that the profiler waits for."""
    operation, worker, sizes = CASES[name]
    module = operations()[operation]
    shape = module.TINY[0] if device == "cpu" else module.Shape(**sizes)
    work = next(work for work in module.works([shape], device) if work.name == worker)
    work.run(0)
    if device == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    work.run(1)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parse(text: str) -> list[dict[str, Any]]:
    """Kernel launches of ``--csv --page raw``: names, then units, then a line a launch.

    A counter that this device lacks is None.
    """
    lines = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    found = []
    for values in lines[2:]:
        launch = dict(zip(lines[0], values, strict=False))
        counters = {name: _number(launch.get(metric, "")) for metric, name in METRICS.items()}
        found.append({"kernel": launch["Kernel Name"], **counters})
    return found


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def measured(name: str, output: Path, flags: list[str]) -> list[dict[str, Any]]:
    """The rows of one case; where the profiler fails, one that says why."""
    log = output / f"{name.replace(' ', '-').replace(',', '')}.csv"
    output.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "benchmarks.gpu.counters", "--case", name, *flags]
    command = [*COMMAND, "--log-file", str(log), *program, "--output", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [{"case": name, "error": f"not done after {SECONDS} s"}]
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    said = done.stdout + done.stderr + text
    found = parse(text)
    if DENIED in said:
        return [{"case": name, "error": ADVICE}]
    if done.returncode != 0 or not found:
        return [{"case": name, "error": said[-MAX_ERROR:] or "no kernel was counted"}]
    return [{"case": name, **row} for row in found]


def main(argv: list[str] | None = None) -> int:
    """Count, print, write after each case; 1 if one failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="run this one alone, without the profiler")
    arguments = parser.parse_args(argv)
    device = read_device(parser, arguments)
    if arguments.case:
        run_case(arguments.case, device)
        return 0
    rows: list[dict[str, Any]] = []
    for name in CASES:
        found = measured(name, arguments.output, ["--tiny"] * arguments.tiny)
        rows += found
        print(*found, sep="\n", flush=True)
        write(arguments.output / "counters.json", {"rows": rows})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
