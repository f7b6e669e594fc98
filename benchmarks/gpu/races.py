"""``python -m benchmarks.gpu.races``: every operation under compute-sanitizer's race detector."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.run import operations
from benchmarks.gpu.work import write

__all__ = ["check", "main"]

COMMAND = ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9")
RACES = 9
SECONDS = 120


def check(operation: str, output: Path, flags: list[str]) -> dict[str, Any]:
    """The row of one operation: no race, or the detector's last lines."""
    program = [sys.executable, "-m", "benchmarks.gpu.parity", "--op", operation, *flags]
    command = [*COMMAND, *program, "--output", str(output / operation)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"operation": operation, "races": None, "error": f"not done after {SECONDS} s"}
    lines = (done.stdout + done.stderr).splitlines()
    found = {0: False, RACES: True}.get(done.returncode)
    row: dict[str, Any] = {"operation": operation, "races": found}
    return row if found is False else {**row, "error": "\n".join(lines[-12:])}


def main(argv: list[str] | None = None) -> int:
    """Check all operations, write a row after each; 1 if one has a race or could not be checked."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args(argv)
    read_device(parser, arguments)
    rows: list[dict[str, Any]] = []
    for operation in operations():
        rows.append(check(operation, arguments.output, ["--tiny"] * arguments.tiny))
        print(rows[-1], flush=True)
        write(arguments.output / "races.json", {"rows": rows})
    return int(any(row["races"] is not False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
