"""Two processes train a model in shards: one or both are killed, or a bit of a file is flipped."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.faults.damage import flip
from tests.faults.jobs import MAIN, Ended, Operations, job, result, started, wait
from tests.faults.report import Result, choose

__all__ = ["run"]

STAGE = "autoencoder"
MORE = ("--fsdp", "--save_total_limit=2", "--max_steps=6")
KILLS = 40  # flipped bits are half as many
RANKS = (0, 1)


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """`count` kills, of the first process, the second and both in turn; half as many flipped bits.

    Args:
        folder: scratch space.
        count: None for 40.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    ended = _train(whole, {})
    assert all(each.status == 0 for each in ended), ended
    kills = KILLS if count is None else count
    yield from _kills(whole, folder / "killed", kills)
    yield from _flips(whole, folder / "flipped", max(1, kills // 2))


def _kills(whole: Path, place: Path, count: int) -> Iterator[Result]:
    """SIGKILL before an operation on a file, then the same command again."""
    expected = result(whole / STAGE)
    last = [int(_count_file(whole, rank).read_text()) for rank in RANKS]
    for index, share in enumerate(choose(range(1, 101), count)):
        chosen = ((0,), (1,), RANKS)[index % 3]
        at = {rank: max(1, last[rank] * share // 100) for rank in chosen}
        place.mkdir()
        killed, again = _train(place, at), _train(place, {})
        same = all(e.status == 0 for e in again) and result(place / STAGE) == expected
        was_killed = any(killed[rank].status == -signal.SIGKILL for rank in chosen)
        outcome = "resumed bit-equal" if same else "other result"
        case = f"SIGKILL before file operation {at}"
        if not was_killed:
            outcome = "ended before it was killed"
        detail = "".join(f"\n[{e.status}] {e.errors[-1200:]}" for e in [*killed, *again])
        yield Result(case, outcome, same and was_killed, detail)
        shutil.rmtree(place)


def _flips(whole: Path, place: Path, count: int) -> Iterator[Result]:
    """One bit of a file of the newest checkpoint: the run goes on from the one before."""
    expected, newest = result(whole / STAGE), "checkpoint-6"
    files = sorted(path for path in (whole / STAGE / newest).rglob("*") if path.is_file())
    for index in range(count):
        name = files[index * len(files) // count].relative_to(whole)
        shutil.copytree(whole, place)
        flip(place / name)
        again = _train(place, {})
        is_aside = (place / STAGE / f"incomplete-{newest}").is_dir()
        same = all(e.status == 0 for e in again) and result(place / STAGE) == expected
        outcome = "set aside, bit-equal from the one before" if is_aside and same else "other"
        detail = "".join(e.errors[-600:] for e in again)
        yield Result(f"one bit of {name.name} flipped", outcome, is_aside and same, detail)
        shutil.rmtree(place)


def _count_file(folder: Path, rank: int) -> Path:
    return folder.parent / f"{folder.name}.{rank}.operations"


def _train(folder: Path, kill_at: dict[int, int]) -> list[Ended]:
    """The job in two processes; where one ends badly, the other is killed, as torchrun does.

    Args:
        folder: of the job.
        kill_at: number of the operation at which a process is killed.
    """
    words = job(folder, STAGE, *MORE)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    logs = [folder.parent / f"{folder.name}.{rank}.log" for rank in RANKS]

    def work(rank: int) -> int:
        os.environ.update(
            WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            RANK=str(rank), LOCAL_RANK=str(rank),
        )  # fmt: skip
        Operations(folder, kill_at.get(rank), _count_file(folder, rank)).install()
        return MAIN[STAGE](words)

    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(lambda rank=rank: work(rank), log))
            for rank, log in zip(RANKS, logs, strict=True)
        ]
        while all(_runs(process) for process in processes):
            time.sleep(0.02)
        first = next(rank for rank in RANKS if not _runs(processes[rank]))
        ended = {first: wait(processes[first], logs[first])}
        seconds = 60.0 if ended[first].status == 0 else 1.0
        ended[1 - first] = wait(processes[1 - first], logs[1 - first], seconds)
    return [ended[rank] for rank in RANKS]


def _runs(process: int) -> bool:
    """Whether a child of this process has not ended."""
    found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return found is None
