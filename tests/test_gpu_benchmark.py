"""The GPU benchmark as far as a CPU can run it: rows, buffers, captures, refusal without a GPU. Its
works run once in tests/triton/test_interpreted_benchmark.py.
"""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import (
    ceilings,
    counters,
    decoding,
    device_time,
    energy_score,
    parity,
    races,
    run,
    suite,
    training_step,
)
from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.work import Measurement, Work, relative_error, row_of

MEGABYTE = 1 << 20
H200 = Ceilings(bandwidth=4.3e12, tensor_rate=0.79e15)


def work(**changes):
    fields = {
        "operation": "energy_score", "label": energy_score.ANALYTIC, "name": "triton",
        "shape": asdict(energy_score.REFERENCE), "run": lambda index: index, "buffers": 3,
        "traffic": 43 * 10**6,
    }  # fmt: skip
    return Work(**fields | changes)


def measurement(median=0.1):
    return Measurement(median, 0.9 * median, 1.1 * median, MEGABYTE, True, 21)


def test_a_row():
    row = row_of(work(flops=10**9), measurement(), H200)
    assert row["floor_ms"] == pytest.approx(0.01)
    assert row["share_of_floor"] == pytest.approx(0.1)
    assert row["gigabytes_per_second"] == pytest.approx(430)
    assert row["teraflops"] == pytest.approx(10)
    bound = row_of(work(flops=79 * 10**9), measurement(), H200)
    assert bound["floor_ms"] == pytest.approx(0.1)  # products take longer than traffic
    unknown = row_of(work(), measurement(), None)
    assert unknown["floor_ms"] is None and unknown["share_of_floor"] is None
    assert json.loads(json.dumps(row)) == row


def test_ceilings_are_measured():
    """The copy's are bytes read and written, the GEMM's additions and multiplications."""
    seconds = {"copy": 1e-3, "gemm": 2e-3}
    found = measure_ceilings("cpu")
    assert found.bandwidth > 0 and found.tensor_rate > 0
    with pytest.MonkeyPatch.context() as patch:
        times = iter(seconds.values())
        patch.setattr(ceilings, "_seconds", lambda run, device: (run(), next(times))[1])
        patch.setattr(ceilings, "TINY", (1000, 10))
        found = measure_ceilings("cpu")
    assert found == Ceilings(bandwidth=2e6, tensor_rate=1e6)
    assert found.floor_ms(traffic=2e6, flops=0) == 1e3 and found.floor_ms(0, 3e6) == 3e3


def test_the_line_of_a_row():
    row = row_of(work(), measurement(), H200)
    assert "0.1000 ms" in run.line(row) and "10% of floor" in run.line(row)
    assert "not captured" not in run.line(row)
    assert "not captured" in run.line(row | {"is_captured": False, "share_of_floor": None})


def test_buffers_leave_the_cache_and_are_used_alike():
    for bytes_each in (1, 1000, 2 * MEGABYTE, 400 * MEGABYTE):
        count = device_time.num_buffers(bytes_each, 50 * MEGABYTE)
        assert count >= 2 and count * bytes_each >= 4 * 50 * MEGABYTE
        launches = device_time.num_launches(count)
        assert launches >= 20 and launches % count == 0
        assert device_time.num_launches(count, 1e4) == count
        assert device_time.num_warmups(count) >= count


def test_works_are_timed_one_by_one():
    def timer(work):
        return measurement(work.run(2))

    rows = list(run.measured(iter([work(), work(name="rival")]), H200, timer))
    assert [row["name"] for row in rows] == ["triton", "rival"]
    assert all(row["median_ms"] == 2 for row in rows)


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path):
    """A work that cannot be timed, inputs that cannot be made, and what was written before."""
    written = []

    def works(shapes, device, compiled):
        yield work(name="first")
        yield work(name="broken", run=None)
        yield work(name="last")
        raise AssertionError("no parity")

    module = SimpleNamespace(works=works, SHAPES=[], QUICK=[energy_score.REFERENCE] * 2)
    monkeypatch.setattr(run, "operations", lambda: {"energy_score": module})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        run, "environment", lambda device: {"device": "A GPU", "architecture": "sm_90"}
    )
    monkeypatch.setattr(run, "measure", lambda work: measurement(work.run(2)))
    monkeypatch.setattr(run, "measure_ceilings", lambda device: H200)
    write = run.write
    monkeypatch.setattr(
        run,
        "write",
        lambda path, results: written.append(write(path, results) or len(results["rows"])),
    )
    assert run.main(["--quick", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "a-gpu.json").read_text())
    rows = results["rows"]
    assert results["ceilings"] == asdict(H200) and rows[0]["share_of_floor"] == pytest.approx(0.005)
    assert written == list(range(1, 9)) and len(rows) == 8
    assert [row["name"] for row in rows] == ["first", "broken", "last", ""] * 2
    assert [("error" in row) for row in rows] == [False, True, False, True] * 2
    assert "TypeError" in rows[1]["error"] and rows[3]["error"] == "AssertionError: no parity"
    assert all(row["shape"] == asdict(energy_score.REFERENCE) for row in rows)


def test_traffic_of_the_reference_shape():
    assert energy_score.REFERENCE.traffic() == 8192 * 128 * 2 * 18
    assert energy_score.REFERENCE.given_traffic() == 8192 * 128 * 2 * 116
    assert energy_score.REFERENCE.eager_bytes() == 3_355_443_200


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_every_operation_has_shapes_and_works():
    modules = run.operations()
    assert {"energy_score", "reparameterize"} <= set(modules)
    for module in modules.values():
        assert set(module.QUICK) <= set(module.SHAPES) and callable(module.works)
        assert all(isinstance(shape, module.Shape) for shape in module.SHAPES + module.TINY)
        assert len(module.TINY) >= 2  # one of them for the sweep


def test_the_flags_choose_shapes():
    module = SimpleNamespace(SHAPES=[1, 2, 3], QUICK=[1], TINY=[8, 9])
    flags = [(tiny, word) for tiny in (False, True) for word in ("", "quick", "sweep")]
    found = [
        run.chosen(module, SimpleNamespace(tiny=tiny, quick=word == "quick", sweep=word == "sweep"))
        for tiny, word in flags
    ]
    assert found == [[1, 2, 3], [1], [2, 3], [8, 9], [8], [9]]


def test_what_is_not_installed_is_a_row():
    (row,) = run.measured(iter([work(name="Liger", missing="not installed")]), H200, measurement)
    assert row["missing"] == "not installed" and "median_ms" not in row
    assert "Liger: not installed" in run.line(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [run, decoding, training_step, parity, races, counters, suite])
def test_without_a_gpu(program, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = ["--output", str(tmp_path), *(["--op", "energy_score"] * (program is parity))]
    for tiny, reason in (([], "needs a GPU"), (["--tiny"], "needs TRITON_INTERPRET=1")):
        with pytest.raises(SystemExit, match="2"):
            program.main(flags + tiny)
        assert reason in capsys.readouterr().err


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="good" time="1.5"/>
<testcase classname="tests.gpu.test_a" name="bad" time="2">
<failure message="no parity">line</failure></testcase>
<testcase classname="tests.gpu.test_b" name="none" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_failed_tests_are_rows(monkeypatch, tmp_path):
    """Also where the tests are killed before they have written what they found."""
    commands = []

    def started(command, **options):
        commands.append(command)
        (tmp_path / "junit.xml").write_text(JUNIT)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(suite, "read_device", lambda parser, arguments: "cuda")
    monkeypatch.setattr(suite.subprocess, "run", started)
    for has_xdist in (True, False):
        monkeypatch.setattr(suite, "find_spec", lambda name, has_xdist=has_xdist: has_xdist or None)
        assert suite.main(["--output", str(tmp_path)]) == 1
        assert ("-n" in commands[-1]) is has_xdist and "tests/gpu" in commands[-1]
    both = json.loads((tmp_path / "tests.json").read_text())["rows"]
    assert both == [
        {"test": "all", "passed": 1, "failed": 1, "skipped": 1, "seconds": 3.5},
        {"test": "tests.gpu.test_a::bad", "error": "no parity\nline"},
    ]
    (tmp_path / "junit.xml").write_text(JUNIT[:50])
    assert suite.read_junit(tmp_path / "junit.xml") == suite.read_junit(tmp_path / "none") == []


# Captures, on a device that only takes note


class FakeDevice:
    """Stands for torch.cuda: what is called, and whether a graph records it."""

    def __init__(self, monkeypatch):
        self.is_recording, self.replays, self.seen = False, 0, []
        for name in ("synchronize", "reset_peak_memory_stats", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *args: nullcontext())
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: MEGABYTE)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 42.0)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(torch.cuda, "graph", self.record)

    @contextmanager
    def record(self, graph):
        self.is_recording = True
        yield
        self.is_recording = False

    def replay(self):
        self.replays += 1

    def call(self, buffer):
        self.seen.append((self.is_recording, buffer))


def test_a_capture_meets_only_buffers_that_were_warmed(monkeypatch):
    """torch.compile may compile anew for any buffer, which no capture survives."""
    device = FakeDevice(monkeypatch)
    for buffers in (2, 7, 40):
        device.seen.clear()
        found = device_time.measure(work(buffers=buffers, run=device.call))
        first = device.seen.index((True, 0))
        warmed, recorded = device.seen[:first], device.seen[first:]
        assert {buffer for _, buffer in warmed} == set(range(buffers))
        assert [recording for recording, _ in recorded] == [True] * found.launches
        assert {buffer for _, buffer in recorded} == set(range(buffers))
        assert found.is_captured and found.median_ms == 42.0 / found.launches
    assert device.replays == 3 * (1 + device_time.REPLAYS)


def test_what_waits_for_the_device_is_timed_as_it_is_called(monkeypatch):
    device = FakeDevice(monkeypatch)
    found = device_time.measure(work(buffers=3, run=device.call, can_capture=False))
    assert not found.is_captured and device.replays == 0
    assert not any(recording for recording, _ in device.seen)
