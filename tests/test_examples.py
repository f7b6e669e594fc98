"""Every example runs and shows what it says."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_energy_score_learns_both_sides():
    last = run_example("energy_score_in_your_model.py").splitlines()[-1]
    above, below = map(int, re.findall(r"(\d+)%", last))
    assert above > 20 and below > 20 and above + below > 80, last
