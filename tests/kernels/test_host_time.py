"""What calls cost the host, in plain torch calls of the same run: a busy machine slows both."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"(\w+) +(forward.*?) +(\d+) +(\d+) +([\d.]+)")
# Twice what was measured; a scan of the table of settings and torch's dispatch of a custom operator
# had taken 17 plain calls.
MOST_PLAIN_CALLS = 14


def test_host_time():
    """In a process of its own, because it takes the kernels away."""
    command = [sys.executable, "-m", "benchmarks.host_time", "--repeats", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, *lines = done.stdout.splitlines()
    rows = {(match[1], match[2]): match for match in map(ROW.fullmatch, lines) if match}
    assert len(rows) == len(lines) == 14
    launches = {key: int(match[3]) for key, match in rows.items()}
    assert launches["energy_score", "forward + backward"] == 1
    assert launches["linear_argmax", "forward"] == 2
    for key, match in rows.items():
        if "energy_score" in key[0] and "backward" not in key[1]:
            assert float(match[5]) < MOST_PLAIN_CALLS, match[0]
