"""A disk that fills up at any moment: one line, and the last good checkpoint stays."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from safetensors import SafetensorError

from tests.faults.jobs import fork, is_one_line, job, losses_of, result, train
from tests.faults.report import Result, choose

__all__ = ["run"]

STAGE = "baseline"
POINTS = 24  # moments at which space runs out


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """Let the disk fill up at `count` moments of a job, then go on with space.

    A small tmpfs where one can be mounted, which needs root; else the errors that each library
    raises on a full disk, in its place.

    Args:
        folder: scratch space.
        count: moments; None for all.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    ended = train(whole, STAGE)
    assert ended.status == 0, ended.errors
    expected = result(whole / STAGE)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for point in choose(range(1, POINTS + 1), count):
        place = folder / "full"
        place.mkdir()
        if _mount(place, size * point // (POINTS + 1)):
            yield _on_tmpfs(place, expected)
            subprocess.run(["umount", str(place)], check=True)
        else:
            yield _injected(place, point, expected)
        shutil.rmtree(place)


def _mount(place: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    return shutil.which("mount") is not None and (
        subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def _on_tmpfs(place: Path, expected: Any) -> Result:
    size = shutil.disk_usage(place).total
    ended = train(place, STAGE)
    is_one = is_one_line(ended) and _checkpoints_are_whole(place / STAGE)
    subprocess.run(["mount", "-o", "remount,size=1G", str(place)], check=True)
    return _go_on(place, f"tmpfs of {size} bytes", is_one, ended.errors, expected)


def _injected(place: Path, point: int, expected: Any) -> Result:
    """The `point`-th file that is written raises what its library raises on a full disk."""
    words = job(place, STAGE)

    def work() -> int:
        from training_cases import MAIN

        _fill_up_at(point)
        return MAIN[STAGE](words)

    ended = fork(work, place.with_name("full.log"))
    is_one = is_one_line(ended) or ended.status == 0  # fewer files than that are written
    is_one = is_one and _checkpoints_are_whole(place / STAGE)
    return _go_on(place, f"full at written file {point}", is_one, ended.errors, expected)


def _fill_up_at(point: int) -> None:
    written = 0

    def guarded(save: Any, error: Exception, position: int) -> Any:
        def save_or_fail(*args: Any, **options: Any) -> Any:
            nonlocal written
            written += 1
            if written == point:
                Path(str(args[position])).write_bytes(b"half")
                raise error
            return save(*args, **options)

        return save_or_fail

    full = "No space left on device (os error 28)"
    for module in (safetensors.torch, transformers.modeling_utils):
        for name in ("save_file", "safe_save_file"):
            if hasattr(module, name):
                error = SafetensorError(f"Error while serializing: I/O error: {full}")
                setattr(module, name, guarded(getattr(module, name), error, 1))
    unexpected = "[enforce fail at inline_container.cc:672] . unexpected pos 1024 vs 918"
    torch.save = guarded(torch.save, RuntimeError(unexpected), 1)
    os.replace = guarded(os.replace, OSError(errno.ENOSPC, "No space left on device"), 1)


def _checkpoints_are_whole(run_folder: Path) -> bool:
    """Whatever checkpoint counts as good has its losses."""
    from calm.training.checkpoints.complete import last_good_checkpoint

    good = last_good_checkpoint(run_folder, set_aside=False)
    return good is None or len(losses_of(good)) == int(good.name.split("-")[1])


def _go_on(place: Path, case: str, is_one: bool, errors: str, expected: Any) -> Result:
    """With space again, the same command ends as if nothing had been."""
    again = train(place, STAGE)
    same = again.status == 0 and result(place / STAGE) == expected
    outcome = "one line, then bit-equal" if is_one and same else f"exit {again.status}"
    return Result(case, outcome, is_one and same, f"{errors[-400:]} | {again.errors[-300:]}")
