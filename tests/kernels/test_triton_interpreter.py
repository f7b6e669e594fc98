"""Runs tests/triton in processes of their own, where kernels are interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (ROOT / "tests" / "triton").glob("test_*.py"))


SLOW = (
    "test_interpreted_energy_head.py",
    "test_interpreted_energy_score.py",
    "test_interpreted_energy_score_weights.py",
    "test_interpreted_integration.py",
)
FAST = [name for name in FILES if name not in SLOW]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param([name], marks=pytest.mark.slow, id=name) for name in SLOW),
        # The others share two processes, each of which imports torch for seconds.
        *(pytest.param(FAST[part::2], id=f"others-{part}") for part in (0, 1)),
    ],
)
def test_in_the_interpreter(names):
    files = [f"tests/triton/{name}" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
