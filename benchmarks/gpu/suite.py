"""``python -m benchmarks.gpu.suite``: the GPU tests, side by side where pytest-xdist is installed.

Rows: how many tests passed, and each that failed with the end of its message.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.command import make_parser, read_device
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.work import MAX_ERROR, write

__all__ = ["main", "read_junit"]

PROCESSES = 6  # share the GPU: most of their time is spent on compiling


def read_junit(path: Path) -> list[dict[str, Any]]:
    """Rows of a JUnit file; none where there is no whole one."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    rows, ended = [], dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in cases:
        faults = [each for each in case if each.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        ended["failed" if faults else "skipped" if skipped else "passed"] += 1
        for fault in faults:
            message = f"{fault.get('message', '')}\n{fault.text or ''}"
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            rows.append({"test": name, "error": message[-MAX_ERROR:]})
    return [{"test": "all", **ended, "seconds": sum(float(c.get("time", 0)) for c in cases)}, *rows]


def main(argv: list[str] | None = None) -> int:
    """Run the tests; their exit status."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args(argv)
    read_device(parser, arguments)
    junit = arguments.output / "junit.xml"
    parallel = ["-n", str(PROCESSES)] if find_spec("xdist") and not arguments.tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={junit}", *parallel]
    done = subprocess.run(command, cwd=ROOT, check=False)
    write(arguments.output / "tests.json", {"rows": read_junit(junit)})
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
