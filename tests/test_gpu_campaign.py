"""The GPU campaign's runner with stages that pass, fail, hang, crash and leave children behind."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import campaign, training_step
from benchmarks.gpu.campaign import Stage, main, run_campaign, stages


def python(name, code, limit=60.0, **options):
    return Stage(name, "tests.stage_program", (code, "{folder}"), limit, **options)


WRITE = (
    "import json, sys, pathlib\n"
    "path = pathlib.Path(sys.argv[1]) / 'found.json'\n"
    "path.write_text(json.dumps({'rows': [{'name': 'ours', 'median_ms': 1.5}]}))\n"
)
HANG = "import time; time.sleep(30)"
CASES = [
    (python("good", WRITE + "print('done')"), "passed", ""),
    (python("wrong", WRITE + "raise SystemExit('parity failed')"), "failed", "exit status 1"),
    (python("stuck", WRITE + HANG, limit=5.0), "timed out", "after 5 s"),
    (python("crash", WRITE + "import os; os.abort()"), "killed", "by SIGABRT"),
    (python("odd", WRITE + "open(sys.argv[1] + '/cut.json', 'w').write('{')"), "passed", ""),
    (python("bare", "", needs="no-such-program"), "lacks no-such-program", ""),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    found = run_campaign([stage for stage, _, _ in CASES], folder, 120.0, say=lambda line: None)
    return folder, {outcome.name: outcome for outcome in found}


@pytest.mark.parametrize(("stage", "status", "detail"), CASES, ids=lambda value: str(value)[:12])
def test_each_stage_ends_on_its_own(outcomes, stage, status, detail):
    folder, found = outcomes
    outcome = found[stage.name]
    assert (outcome.status, outcome.detail) == (status, detail)
    rows = [] if stage.needs else [{"name": "ours", "median_ms": 1.5}]
    assert outcome.rows == rows  # also of a stage that fails after it has written them
    report = json.loads((folder / "report.json").read_text())
    assert [entry["status"] for entry in report["stages"] if entry["name"] == stage.name] == [
        status
    ]


def test_the_last_lines_say_why(outcomes):
    _, found = outcomes
    assert found["wrong"].last_lines == ["parity failed"] and found["good"].last_lines == ["done"]


def test_the_budget_is_shared(tmp_path):
    many = [python(f"stuck {index}", HANG, limit=6.0) for index in range(3)]
    began = time.monotonic()
    found = run_campaign(many, tmp_path, 13.0, say=lambda line: None)
    assert time.monotonic() - began < 25
    assert [outcome.status for outcome in found] == ["timed out", "timed out", "no time left"]


def test_children_end_with_their_stage(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(child.pid))"
    )
    (found,) = run_campaign([python("parent", code)], tmp_path, 60.0, say=lambda line: None)
    assert found.status == "passed"
    child = int((tmp_path / "parent" / "pid").read_text())
    state = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and ") Z " not in state.read_text():
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def test_a_server_that_has_touched_cuda_costs_an_import_not_a_stage(tmp_path):
    """CUDA does not survive a fork: the stage then starts an interpreter of its own."""
    code = (
        "import sys, torch\n"
        "torch.cuda._is_in_bad_fork = lambda: True\n"
        "from benchmarks.gpu.processes import _execute\n"
        "said = 'import sys; print(sys.argv[1:], \"torch\" in sys.modules)'\n"
        "_execute('tests.stage_program', (said, 'word'), sys.argv[1])"
    )
    log = tmp_path / "log.txt"
    subprocess.run([sys.executable, "-c", code, str(log)], cwd=campaign.ROOT, check=True)
    assert log.read_text() == "['word'] False\n"


def test_resuming_keeps_what_has_passed(tmp_path):
    counter = "open(sys.argv[1] + '/../count', 'a').write('x')\n"
    passing = python("good", WRITE + counter)
    failing = python("wrong", WRITE + counter + "sys.exit(3)")
    for _ in range(2):
        found = run_campaign([passing, failing], tmp_path, 60.0, resume=True, say=lambda line: None)
        assert [outcome.status for outcome in found] == ["passed", "failed"]
    assert (tmp_path / "count").read_text() == "xxx"  # once, and twice


def test_a_campaign_that_is_killed_keeps_its_report(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from tests.test_gpu_campaign import HANG, WRITE, python\n"
        "from benchmarks.gpu.campaign import run_campaign\n"
        "both = [python('good', WRITE), python('stuck', HANG)]\n"
        "run_campaign(both, pathlib.Path(sys.argv[1]), 300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=campaign.ROOT)
    while not (tmp_path / "stuck").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["name"] for entry in report["stages"]] == ["good"]


def test_the_command_lists_failures_and_exits_with_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "stages", lambda **options: [case[0] for case in CASES[:2]])
    monkeypatch.setattr(campaign, "import_beforehand", lambda modules: None)
    assert main(["--budget=60", f"--output={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 stages passed" in said and "parity failed" in said and "exit status 1" in said


def test_names_are_unique_and_modules_exist():
    found = stages()
    assert len({stage.name for stage in found}) == len(found)
    for stage in found:
        assert find_spec(stage.module), stage.module


def test_a_training_step_that_fails_leaves_the_other_rows(monkeypatch):
    def broken():
        raise RuntimeError("no compiler")

    variants = training_step._variants(training_step.QUICK, "cpu")
    monkeypatch.setattr(
        training_step, "_variants", lambda *shape: {**variants, "ours, compiled": broken}
    )
    ours, compiled, published = training_step.rows(training_step.QUICK, "cpu")
    assert compiled == {"name": "ours, compiled", "error": "RuntimeError: no compiler"}
    for row in (ours, published):
        assert row["losses"][2] < row["losses"][0] and row["median_ms"] > 0 and row["mfu"] > 0
