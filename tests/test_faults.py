"""A few cases of each part of `python -m tests.faults`; all of them are run by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        (["kills"], 2), (["damage"], 2), (["contract"], 2), (["disk", "prepare"], 2),
        (["bad_inputs", "hostile"], 20), (["sharded"], 2),
    ],
    ids=str,
)  # fmt: skip
def test_a_few_faults(parts, count):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *parts, f"--count={count}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 cases went wrong" in done.stdout
    assert all(f"{part}: " in done.stdout for part in parts)
