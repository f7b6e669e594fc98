"""The campaign as it will run on a GPU: its own stages at tiny sizes on a CPU, with stages among
them that crash, hang and write half a file; then the tables of its report.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import report as command
from benchmarks.gpu import counters
from benchmarks.gpu.campaign import stages
from tests.test_gpu_campaign import CASES
from tests.test_gpu_counters import recorded

ROOT = Path(__file__).resolve().parents[1]
# A stage of each program; what the operations themselves do runs in test_interpreted_benchmark.py.
SOME = (
    "environment", "parity agreeing_patch", "kernels linear_cross_entropy", "decoding",
    "training_step", "compiled linear_argmax", "sweep agreeing_patch", "ncu", "races",
)  # fmt: skip
FAULTS = {"stuck": "timed out", "crash": "killed", "odd": "passed"}
STARTED = """
import sys
from benchmarks.gpu import campaign
from tests.test_gpu_campaign_run import with_faults
campaign.stages = with_faults
sys.exit(campaign.main(sys.argv[1:]))
"""


def with_faults(**options):
    """The stages, faults in front: what comes after them must not notice."""
    return [stage for stage, _, _ in CASES if stage.name in FAULTS] + stages(**options)


def programs(folder):
    """Stand for the profiler and the race detector, which need a GPU."""
    says = f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({recorded()!r})"
    for name, code in (("ncu", says), ("compute-sanitizer", "")):
        (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
        (folder / name).chmod(0o755)


def run_tiny(folder, names):
    """The report of a whole call of the command."""
    programs(folder)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    flags = ["--tiny", "--budget=800", "--output", str(folder / "out"), "--stages", *names]
    done = subprocess.run(
        [sys.executable, "-c", STARTED, *flags], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == list(names)
    for stage in report["stages"]:
        wanted = FAULTS.get(stage["name"], "passed")
        assert stage["status"] == wanted, (stage["name"], stage["last_lines"])
        assert stage["rows"], stage["name"]
        assert not [row for row in stage["rows"] if "error" in row], stage["name"]
    assert f"{len(names) - 2} of {len(names)} stages passed" in done.stdout
    return report


def check_tables(folder, report, capsys):
    """What the report becomes: no table is empty, and none says that something failed."""
    out = folder / "tables"
    assert command.main([str(folder / "out" / "report.json"), "--output", str(out)]) == 0
    page = (out / "cpu.md").read_text()
    assert "Not measured." not in page and "failed:" not in page
    assert "| stuck | timed out after 5 s | 0 |" in page
    assert all(name in page for name in counters.CASES)
    assert (out / "cpu-models.png").exists()
    capsys.readouterr()
    return page


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stage_of_each_program(tmp_path, capsys):
    """Some 40 s of a CPU core."""
    report = run_tiny(tmp_path, [*FAULTS, *SOME])
    page = check_tables(tmp_path, report, capsys)
    assert "logits in memory, torch.compile" in page and "liger_kernel" in page
