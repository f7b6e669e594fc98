"""SIGKILL at every operation on a file of `calm prepare`, then the same command: the same files.

With one process, and with two: then the number is that of an operation of whichever comes to it,
the first process or one of the two, which the others must not outlive for long.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from calm.cli import main
from calm.data import parts
from tests.faults.jobs import Ended, Operations, contents, fork, is_one_line
from tests.faults.report import Result, choose

__all__ = ["run"]

SHARD = 1000  # bytes, so that a small text has many
SECONDS = 5.0  # in which processes end whose first process was killed


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """Kill a preparation at `count` of its operations, evenly spread, or at each of them.

    Args:
        folder: scratch space.
        count: how many, for each number of processes; None for all.
    """
    from training_cases import write_corpus

    folder.mkdir(parents=True)
    text = write_corpus(folder)
    for workers in (1, 2):
        whole = folder / f"whole{workers}"
        assert _prepare(text, whole, workers).status == 0
        expected = contents(whole)
        for number in choose(range(1, _operations(whole) + 1), count):
            yield _killed(text, folder / "killed", workers, number, expected)


def _prepare(text: str, output: Path, workers: int, kill_at: int | None = None) -> Ended:
    watch = Operations(output, kill_at, output.with_suffix(".operations"))
    words = ["prepare", "--data", text, "--tokenizer", "bpe:300", "--output", str(output)]

    def work() -> int:
        parts.MIN_SHARD = SHARD
        watch.install()
        return main([*words, "--workers", str(workers), "--validation-split-percentage", "20"])

    return fork(work, output.with_suffix(".log"))


def _operations(output: Path) -> int:
    return int(output.with_suffix(".operations").read_text())


def _killed(
    text: str, place: Path, workers: int, number: int, expected: dict[str, bytes]
) -> Result:
    killed = _prepare(text, place, workers, kill_at=number)
    left = _left_behind(place)
    again = _prepare(text, place, workers)
    same = again.status == 0 and contents(place) == expected
    is_told = killed.status == -9 or is_one_line(killed)  # -9: not a worker, but the first process
    outcome = "the same files" if same else f"exit {again.status}, other files"
    if left:
        outcome = f"process {left} lives on"
    shutil.rmtree(place)
    case = f"SIGKILL before file operation {number}, {workers} processes"
    detail = f"{killed.errors[-600:]} | {again.errors[-600:]}"
    return Result(case, outcome, same and is_told and not left, detail)


def _left_behind(place: Path) -> int | None:
    """A process that still writes to `place` after some seconds, or None."""
    deadline = time.monotonic() + SECONDS
    while True:
        found = next((pid for pid in _processes() if _has_open(pid, place)), None)
        if found is None or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _processes() -> list[int]:
    return [
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()
    ]


def _has_open(pid: int, place: Path) -> bool:
    """Whether a process has a file in `place` open, its output file beside it included."""
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:  # it has ended, or is another user's
        return False
    return any(link.startswith(str(place)) for link in links)
