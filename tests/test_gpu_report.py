"""Tables and figures of a campaign's report, whole, partial and empty."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report as command
from benchmarks.gpu.modelled import MODELLED
from benchmarks.gpu.plots import series, sizes
from benchmarks.gpu.report import tables

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"rows": 8192, "num_samples": 8, "num_targets": 100, "width": 128, "spread": 0.2}
WORK = "gaussian, forward + gradient"


def kernel(name, milliseconds, **changes):
    return {
        "operation": "energy_score", "work": WORK, "name": name, "shape": SHAPE | changes,
        "median_ms": milliseconds, "peak_memory_bytes": 2**20, "share_of_floor": 0.25,
    }  # fmt: skip


def stage(name, *rows, status="passed", **more):
    return {"name": name, "status": status, "seconds": 1.0, "detail": "", "last_lines": [],
            "rows": list(rows), **more}  # fmt: skip


def text(name, milliseconds, **more):
    return {"name": name, "batch_size": 1, "temperature": 0.5, "chunk_ms": milliseconds, **more}


FAILED = {"error": "RuntimeError: out of\nmemory | really"}
LONGEST = [{"name": "gemm", "count": 4, "ms": 0.5}]
DEVICE = {
    "device": "A GPU", "bandwidth": 3.0e12, "tensor_rate": 7.9e14, "torch": "2", "triton": "3",
    "cuda": "13", "commit": "abc",
}  # fmt: skip
REPORT = {
    "stages": [
        stage("environment", DEVICE),
        stage("parity energy_score", status="timed out", detail="after 60 s", last_lines=["x", ""]),
        stage(
            "kernels energy_score",
            kernel("triton, analytic", 0.02),
            kernel("torch.cdist", 1.0),
            kernel("published formula", 0.0) | FAILED,
        ),
        stage("compiled energy_score", kernel("published formula, torch.compile", 0.5)),
        stage("sweep energy_score", kernel("triton, analytic", 0.005, rows=2048)),
        stage(
            "decoding",
            text("ours", 0.4, nodes=700),
            text("published", 4.0),
            {"name": "published", **FAILED},
            {"name": "graph", "batch_size": 1, "temperature": 0.5, "nodes": 700, "device_ms": 0.3,
             "longest_kernels": LONGEST},
        ),
        stage(
            "training_step",
            {"name": "ours", "median_ms": 80.0, "mfu": 0.4, "peak_memory_bytes": 2**30,
             "launches": 100, "waits": 0, "longest_kernels": LONGEST},
            {"name": "published", "median_ms": 160.0},
            {"name": "ours, compiled", **FAILED},
        ),
        stage("ncu", {"case": "energy score", "kernel": "_score", "device_ns": 21500.0,
                      "memory_percent": 61.2, "registers": 96.0}, {"case": "head", **FAILED}),
        stage("races", status="lacks compute-sanitizer"),
    ]
}  # fmt: skip


def lines(name):
    return tables(REPORT)[name].splitlines()


def test_kernels_and_their_rivals():
    _, _, cdist, published, compiled = lines("gpu-kernels")
    assert cdist.endswith("| 0.020 | 25 % | torch.cdist | 1.000 | **50.00x** | 1.0 / 1.0 |")
    assert "| failed: RuntimeError: out of memory \\| really | – |" in published
    assert "| published formula, torch.compile | 0.500 | **25.00x** |" in compiled
    assert "rows 2048" in lines("gpu-sweeps")[2]


def test_decoding_and_the_training_step():
    ours, published, failed = lines("gpu-decoding")[2:]
    assert ours == "| ours | 1 | 0.5 | 0.400 | – | – | – | 700 | 0.300 |"
    assert "| 4.000 | – | **10.00x** |" in published and "failed: RuntimeError" in failed
    step, rival, compiled = lines("gpu-training")[2:]
    assert step == "| ours | 80.000 | 1.00x | – | 40.0 % | 1.0 | 100 | 0 |"
    assert "| 160.000 | **2.00x** |" in rival and "failed" in compiled
    assert lines("gpu-longest")[2:] == [
        "| decode step, batch 1, T = 0.5 | gemm | 4 | 0.500 |",
        "| training step, ours | gemm | 4 | 0.500 |",
    ]


def test_counters_stages_and_ceilings():
    score, failed = lines("gpu-counters")[2:]
    assert score == "| energy score | _score | 21.5 | – | – | 61 % | – | – | 96 |"
    assert "failed: RuntimeError" in failed
    assert "| A GPU | 3.00 | 790 |" in lines("gpu-environment")[2]
    assert lines("gpu-stages")[0] == "7 of 9 stages passed."
    assert "| parity energy_score | timed out after 60 s | 0 | x |" in lines("gpu-stages")
    assert "| kernels energy_score | passed | 1 |  |" in lines("gpu-stages")


def test_modelled_times_stand_in_their_pages_and_beside_measurements():
    for each in MODELLED:
        page = (ROOT / "calm_kernels" / each.operation / "README.md").read_text(encoding="utf-8")
        assert each.quoted in page, each
        assert f"| {each.operation} | {each.what} | {each.quoted} |" in (
            ROOT / "docs" / "gpu.md"
        ).read_text(encoding="utf-8")
    first, *_, last = lines("gpu-modelled")[2:]
    assert first.endswith("| 21 µs | 20.0 µs |") and last.endswith("| not measured |")
    recompute = next(each for each in MODELLED if each.beyond)
    rows = [
        {"operation": "energy_head", "work": recompute.work, "name": name, "median_ms": time,
         "shape": recompute.shape} for name, time in (("triton", 16.0), ("triton, recompute", 20.5))
    ]  # fmt: skip
    assert recompute.measured(rows) == "4.5 ms" and recompute.measured(rows[:1]) == "not measured"


def test_a_modelled_time_is_of_a_size_that_is_measured():
    pytest.importorskip("triton")
    from dataclasses import asdict

    from benchmarks.gpu.run import operations

    for each in MODELLED:
        shapes = [asdict(shape) for shape in operations()[each.operation].SHAPES]
        assert any(each.shape.items() <= shape.items() for shape in shapes), each


@pytest.mark.parametrize("kept", range(len(REPORT["stages"]) + 1))
def test_a_report_may_end_anywhere(kept):
    for rows in (True, False):
        part = [{**each, "rows": each["rows"] if rows else []} for each in REPORT["stages"][:kept]]
        found = tables({"stages": part})
        assert found.keys() == tables({}).keys() and all(found.values())


def test_series_follow_one_size():
    rows = [kernel("triton", 2.0), kernel("triton", 1.0, rows=512), kernel("torch", 9.0, rows=512),
            kernel("triton", 7.0, rows=512, width=64), kernel("torch", 0.0)]  # fmt: skip
    assert series(rows, "rows") == {"triton": [(512, 1.0), (8192, 2.0)], "torch": [(512, 9.0)]}
    assert sizes(rows) == ["rows"]


def test_the_command_writes_pages_and_figures(tmp_path, capsys):
    page, saved = tmp_path / "page.md", tmp_path / "report.json"
    saved.write_text(json.dumps(REPORT))
    page.write_text("<!-- gpu-training: begin -->old<!-- gpu-training: end -->, after")
    flags = [str(saved), "--readme", str(page), "--output", str(tmp_path / "out")]
    assert command.main(flags) == 0
    filled = page.read_text()
    assert "old" not in filled and "| ours | 80.000 |" in filled and filled.endswith(", after")
    assert "| ours | 80.000 |" in (tmp_path / "out" / "a-gpu.md").read_text()
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["a-gpu-energy-score-gaussian--forward---gradient.png", "a-gpu-models.png"]
    assert "7 of 9 stages passed" in capsys.readouterr().out
    page.write_text("no place")
    with pytest.raises(ValueError, match="markers of none"):
        command.main(flags)


def test_tables_need_the_standard_library_alone(tmp_path):
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(REPORT))
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(ROOT / "benchmarks" / "report.py"), str(saved),
         "--output", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no figures: No module named 'matplotlib'" in done.stdout
    assert "| ours | 80.000 |" in (tmp_path / "a-gpu.md").read_text()
