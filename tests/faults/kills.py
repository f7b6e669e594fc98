"""SIGKILL at every operation on a file, then the same command again: the same weights and logs."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.jobs import count_operations, result, train
from tests.faults.report import Result, choose

__all__ = ["run"]

STAGE = "baseline"
MORE = ("--save_total_limit=2", "--max_steps=6")


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """Kill a job at `count` of its operations, evenly spread, or at each of them.

    Args:
        folder: scratch space.
        count: how many; None for all.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    ended = train(whole, STAGE, *MORE)
    assert ended.status == 0, ended.errors
    expected = result(whole / STAGE)
    for number in choose(range(1, count_operations(whole) + 1), count):
        place = folder / "killed"
        place.mkdir()
        killed = train(place, STAGE, *MORE, kill_at=number)
        again = train(place, STAGE, *MORE)
        same = again.status == 0 and result(place / STAGE) == expected
        outcome = "resumed bit-equal" if same else f"exit {again.status}, other result"
        is_ok = same and killed.status == -9
        yield Result(f"SIGKILL before file operation {number}", outcome, is_ok, again.errors[-600:])
        shutil.rmtree(place)
