"""The benchmark of `calm prepare`: its text, its figures; all of it at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import preparing
from calm.data.parts import MIN_SHARD

ROOT = Path(__file__).resolve().parents[1]


def test_the_text_is_that_of_sources_that_can_be_read(tmp_path):
    (tmp_path / "b").mkdir()
    files = {"b/z.py": b"z = 1\n", "a.py": b"a = 1\n", "c.txt": b"no", "e.py": b" \n"}
    for name, content in {**files, "d.py": b"\xff = 1\n"}.items():
        (tmp_path / name).write_bytes(content)
    texts = list(preparing.sources(tmp_path))
    assert texts == ["a = 1\n", "z = 1\n"]
    assert preparing.write_corpus(iter(texts), tmp_path / "text.jsonl", 3) == texts[:1]
    assert json.loads((tmp_path / "text.jsonl").read_text()) == {"text": "a = 1\n"}
    with pytest.raises(SystemExit, match=r"hold 0 MB of Python; lower --megabytes"):
        preparing.write_corpus(iter(texts), tmp_path / "text.jsonl", 100)


def test_ratios_are_those_of_rounds():
    found = preparing.ratios([2.0, 4.0, 8.0], [1.0, 3.0, 8.0])
    assert found == {
        "prepare_s": 4.0, "encode_batch_s": 3.0, "least_ratio": 0.5, "median_ratio": 0.75,
        "rounds": 3,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_those_of_a_process_and_its_children():
    """Of memory that a child holds for a moment, and gives back before anybody looks."""
    work = "x = bytearray(b'1') * 2**26; del x; input()"
    with preparing.watched(os.getpid()) as above:
        child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE)
        own = preparing.held(preparing._status(os.getpid()), "VmRSS")
        while above.get(child.pid, -own) + own < 64:  # not seen yet, or not at its peak
            assert child.poll() is None
        child.communicate(b"\n")
    assert 64 < above[child.pid] + own < 100
    assert set(above) >= {os.getpid(), child.pid}


@pytest.mark.long
def test_all_of_it(tmp_path):
    words = ("--megabytes", "2", "--rounds", "1", "--steps", "2", "--workers", "2")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.preparing", *words, "--json", tmp_path / "found.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["rows"].values()
    assert list(found["rows"]) == ["2 processes"] and len(row["peak_memory_mib"]) == 3
    assert all(0 < row[clock]["least_ratio"] < 3 for clock in ("wall", "processor"))
    assert found["text"]["bytes"] > 2 * MIN_SHARD * 0.9
    assert 0 < found["training"]["median_data_share"] < 0.5
    assert preparing.results_table(found) in done.stdout
