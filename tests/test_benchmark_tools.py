"""What the CPU benchmarks stand on: parity before time, ranges in tables, workers over pipes."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from benchmarks import published, report
from benchmarks.measure import Baseline, compare
from benchmarks.shapes import ENERGY
from benchmarks.workers.protocol import Worker, WorkerError
from benchmarks.workers.published_code import given_draws


class FakeBenchmark:
    """Times of 1 s; remembers whether it was asked to time anything."""

    def __init__(self):
        self.extra_info, self.timed = {}, False
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))

    def pedantic(self, run, setup, rounds):
        self.timed = True
        for _ in range(rounds):
            setup()
            run()


def ours():
    return torch.arange(3.0)


def failing_check():
    raise AssertionError("other numbers")


@pytest.mark.parametrize(
    "wrong",
    [Baseline(lambda: ours() + 1), Baseline(ours, failing_check)],
    ids=["outputs", "check"],
)
def test_a_wrong_baseline_stops_before_anything_is_timed(wrong):
    benchmark = FakeBenchmark()
    with pytest.raises(AssertionError, match="'wrong' and ours differ, nothing is timed"):
        compare(benchmark, ours, {"right": Baseline(ours), "wrong": wrong}, shape=ENERGY)
    assert not benchmark.timed


def test_right_baselines_are_timed():
    benchmark = FakeBenchmark()
    compare(benchmark, ours, {"right": Baseline(ours)}, shape=ENERGY, rounds=2)
    assert benchmark.timed
    assert benchmark.extra_info["baselines"]["right"]["median_ms"] < 1000


# Tables


def make_run(speedup, requirement=1.0):
    info = {
        "median_ms": 10 * speedup,
        "peak_memory_bytes": 2**20,
        "baselines": {
            "plain": {
                "median_ms": 10 * speedup**2,
                "speedup": speedup,
                "peak_memory_bytes": 2**21,
                "memory_share": 0.5,
            }
        },
        "requirements": [
            {"baseline": "plain", "min_speedup": requirement, "max_memory_share": None}
        ],
    }
    machine = {"processor_name": "P", "threads": 2, "torch": "2", "python_version": "3"}
    return {
        "machine_info": machine,
        "commit_info": {"id": "abc"},
        "benchmarks": [{"group": "work", "extra_info": info}],
    }


def published_run(ratio):
    row = published.ratios_of([1.0, 2.0, 4.0], [ratio, 2 * ratio, 8 * ratio])
    run = make_run(1.0)
    del run["benchmarks"]
    memory = {"ours": 100.0, "published": 150.0}
    return {**run, "published_info": {}, "rows": {"step": row}, "peak_memory_mib": memory}


def test_ratios_are_those_of_the_rounds():
    assert published.ratios_of([1.0, 2.0, 4.0], [3.0, 4.0, 4.0]) == {
        "ours_ms": 2.0, "published_ms": 4.0, "least_ratio": 1.0, "median_ratio": 2.0, "rounds": 3
    }  # fmt: skip


def test_tables_quote_the_range_over_the_runs():
    table = report.markdown_table([make_run(3.0), make_run(2.0)])
    assert table.splitlines()[0] == (
        "| work | ours, ms | baseline | baseline, ms | speed-up "
        "| peak memory, ours / baseline, MiB |"
    )
    assert table.splitlines()[-1] == (
        "| work | 20.00–30.00 | plain | 40.0–90.0 | **2.0–3.0x** | 1.0 / 2.0 |"
    )
    assert "| 0.9–3.0x |" in report.markdown_table([make_run(3.0), make_run(0.9)])
    rows = report.published_table([published_run(2.0), published_run(1.5)]).splitlines()
    assert "| step | 2.0 | 3.0–4.0 | **1.50–2.00x** | 1.50x |" in rows
    assert rows[-1] == "Peak memory: ours 100 MiB, published code 150 MiB (1.50x ours)."


def test_runs_must_have_the_same_rows():
    other = make_run(2.0)
    other["benchmarks"][0]["group"] = "other work"
    with pytest.raises(ValueError, match=r"number 2 differ in .*other work"):
        report.markdown_table([make_run(2.0), other])


def test_report_fills_the_readme_and_fails_where_one_run_falls_short(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- published: begin -->old<!-- published: end --> between "
        "<!-- benchmarks: begin -->old<!-- benchmarks: end -->"
    )
    runs = [make_run(2.0, 1.5), make_run(1.2, 1.5), published_run(2.0)]
    paths = [tmp_path / f"{number}.json" for number in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        path.write_text(json.dumps(run))
    assert report.main([*map(str, paths), "--readme", str(readme)]) == 1
    text = readme.read_text()
    assert "old" not in text and text.index("| step |") < text.index("| work | 12.00")
    assert "2 runs, least to greatest" in text
    printed = capsys.readouterr().out
    assert "met   work against plain: 2.00x" in printed
    assert "SHORT work against plain: 1.20x" in printed


# Workers

FAKE = textwrap.dedent("""
    import os, sys
    from benchmarks.workers.protocol import reply_channel, serve

    def double(number):
        print("a library prints this")
        return 2 * number

    serve({"double": double, "end": lambda: os._exit(3)}, sys.stdin, reply_channel())
""")


@pytest.fixture
def worker():
    with Worker("fake", [sys.executable, "-c", FAKE]) as started:
        yield started


def test_a_worker_answers_and_goes_on_after_an_error(worker):
    assert worker("double", number=4) == 8
    with pytest.raises(WorkerError, match=r"fake: double failed(.|\n)*unexpected keyword"):
        worker("double", count=1)
    assert worker("double", number=5) == 10


def test_a_worker_that_ends_is_reported(worker):
    with pytest.raises(WorkerError, match="fake: ended with exit code 3"):
        worker("end")


def test_an_interpreter_that_is_missing():
    with pytest.raises(WorkerError, match="cannot run"):
        Worker("fake", ["no-such-interpreter"])


def test_workers_do_the_same_number_of_rounds(worker):
    work = published.Work("row", "none", "double", {"number": 3})
    with Worker("other", [sys.executable, "-c", FAKE]) as other:
        row = published.measure_work(worker, other, work, rounds=3)
    assert (row["rounds"], row["median_ratio"]) == (3, 1.0)


def test_what_is_missing_is_named(tmp_path, capsys):
    arguments = ["--checkout", str(tmp_path), "--python", sys.executable]
    assert published.main(arguments) == 1
    assert "has no models/modeling_energy.py; see --help" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    for name in published.NEEDED:
        (tmp_path / name).write_text("import a_package_that_is_missing")
    assert published.main(arguments) == 1
    assert "Install what is missing there: pip install torch" in capsys.readouterr().err


def test_given_draws_replace_those_of_torch():
    uniform, normal = torch.full((2, 3), 0.25), torch.ones(4, 2)
    with given_draws([uniform], [normal]):
        assert torch.equal(torch.rand((2, 3), dtype=torch.float32), uniform)
        assert torch.equal(torch.randn(4, 2), normal)
    assert torch.rand(2).shape == (2,)
    expected = r"draws \(3,\), but \(2, 3\) is given"
    with pytest.raises(AssertionError, match=expected), given_draws([uniform]):
        torch.rand(3)
    with pytest.raises(AssertionError, match="not used"), given_draws([uniform]):
        pass


def test_the_protocol_needs_the_standard_library_alone():
    program = (
        "import sys, benchmarks.workers.protocol;"
        "assert not {'torch', 'calm', 'calm_kernels'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
