"""What Nsight Compute writes becomes rows; what stops it, an error with advice."""

import json
import stat
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import counters

NAMES = (
    "ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream",
    "Block Size", "Grid Size", "Device", "CC", *sorted(counters.METRICS),
)  # fmt: skip
UNITS = ("",) * 11 + ("byte", "byte", "%", "ns", "register/thread", "%", "%")
LAUNCHES = [
    ("0", "7", "python3.12", "127.0.0.1", "_score_kernel", "1", "7", "(128, 1, 1)", "(8192, 1, 1)",
     "0", "9.0", "37,749,120", "16,777,216", "61.25", "21,504", "96", "n/a", "44.5"),
    ("1", "7", "python3.12", "127.0.0.1", 'void at::native::fill<4, "x">(int, float)', "1", "7",
     "(128, 1, 1)", "(64, 1, 1)", "0", "9.0", "0", "512", "0.5", "1,600", "16", "0", "12"),
]  # fmt: skip


def recorded():
    """The format of ncu 2025.3: its own lines, names, units, a line a launch."""

    def line(values):
        return ",".join('"' + value.replace('"', '""') + '"' for value in values)

    return "\n".join(
        ["==PROF== Connected to process 7", "==PROF== Profiling: 0%....100%",
         *map(line, (NAMES, UNITS, *LAUNCHES))]
    )  # fmt: skip


def test_a_row_a_launch():
    first, second = counters.parse(recorded())
    assert first == {
        "kernel": "_score_kernel", "device_ns": 21504, "bytes_read": 37749120,
        "bytes_written": 16777216, "memory_percent": 61.25, "occupancy_percent": 44.5,
        "registers": 96, "tensor_percent": None,
    }  # fmt: skip
    assert second["kernel"] == 'void at::native::fill<4, "x">(int, float)'
    assert second["tensor_percent"] == 0


@pytest.mark.parametrize("text", ["", "==ERROR== no device", '"ID","Kernel Name"'])
def test_no_launches(text):
    assert counters.parse(text) == []


def profiler(tmp_path, monkeypatch, says, status):
    """A program `ncu` that writes what it says to its log file."""
    code = (
        f"#!{sys.executable}\nimport sys\n"
        f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({says!r})\n"
        f"sys.exit({status})\n"
    )
    program = tmp_path / "ncu"
    program.write_text(code)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("says", "status", "error"),
    [
        (f"==ERROR== {counters.DENIED} - The user does not have permission", 1, "run as root"),
        ("==ERROR== Failed to find metric", 255, "Failed to find metric"),
        ("==WARNING== No kernels were profiled.", 0, "No kernels were profiled"),
        ("", 0, "no kernel was counted"),
    ],
)
def test_what_stops_the_profiler_is_a_row(tmp_path, monkeypatch, says, status, error):
    profiler(tmp_path, monkeypatch, says, status)
    (row,) = counters.measured("energy score", tmp_path, [])
    assert row["case"] == "energy score" and error in row["error"]


def test_every_case_is_written(tmp_path, monkeypatch):
    profiler(tmp_path, monkeypatch, recorded(), 0)
    monkeypatch.setattr(counters, "read_device", lambda parser, arguments: "cuda")
    assert counters.main(["--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "counters.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [name for name in counters.CASES for _ in LAUNCHES]
