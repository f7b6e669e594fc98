"""Training jobs in processes of their own, which can be killed at any operation on a file.

A process is forked from this one, which has imported everything, so that a job takes a second. An
audit hook counts operations on files inside the job's folder: files opened for writing, renamed,
removed, folders made and removed, and the beginning, middle and end of weights being written.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from torch.distributed.checkpoint import FileSystemWriter

sys.path.append(str(Path(__file__).resolve().parents[1] / "calm"))

from training_cases import MAIN, flags, logs, write_corpus

__all__ = ["Ended", "Operations", "contents", "fork", "is_one_line", "job", "result", "train"]

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link")


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status (negative: the signal) and its standard error."""

    status: int
    errors: str


class Operations:
    """Counts operations on files in `folder`, and kills the process before number `kill_at`.

    Args:
        folder: what the job writes.
        kill_at: number of an operation; None only counts.
        count_file: gets the number of operations.
    """

    def __init__(self, folder: Path, kill_at: int | None, count_file: Path) -> None:
        self.folder, self.kill_at, self.count_file = str(folder), kill_at, count_file
        self.count = 0
        self._is_counting = False

    def install(self) -> None:
        """Watch this process from now on; a hook cannot be removed."""
        sys.addaudithook(self._on_event)
        torch.save = self._watched(torch.save)
        for module in (safetensors.torch, transformers.modeling_utils):
            for name in ("save_file", "safe_save_file"):
                if hasattr(module, name):
                    setattr(module, name, self._watched(getattr(module, name)))
        FileSystemWriter.write_data = self._watched_shards(FileSystemWriter.write_data)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, mode = arguments
            is_change = isinstance(mode, int) and bool(mode & WRITES)
        else:
            path, is_change = (arguments or (None,))[0], event in CHANGES
        if is_change and isinstance(path, (str, bytes, os.PathLike)):
            self._count(os.fsdecode(path))

    def _count(self, path: str) -> None:
        if self._is_counting or not os.path.abspath(path).startswith(self.folder):
            return
        self._is_counting = True  # writing the count is an operation too
        self.count += 1
        if self.kill_at is None:
            self.count_file.write_text(str(self.count))
        elif self.count >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._is_counting = False

    def _watched(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """`save`, whose second argument is a path, with moments to be killed at."""

        def watched(data: Any, path: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(path, str | os.PathLike):  # memory, or a file that others watch
                return save(data, path, *args, **options)
            self._count(str(path))
            result = save(data, path, *args, **options)
            self._written(path)
            return result

        return watched

    def _watched_shards(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Likewise for the shards that a process writes of a checkpoint."""

        def watched(writer: Any, *args: Any) -> Any:
            future = write(writer, *args)
            future.wait()
            for path in sorted(writer.path.glob(f"__{torch.distributed.get_rank()}_*")):
                self._written(path)
            return future

        return watched

    def _written(self, path: str | os.PathLike[str]) -> None:
        """Two moments to be killed at: half of a file is written, and all of it."""
        if self.kill_at is not None and self.count + 1 == self.kill_at:
            os.truncate(path, os.path.getsize(path) // 2)
        self._count(str(path))
        self._count(str(path))


def fork(work: Callable[[], int], log: Path, seconds: float = 300) -> Ended:
    """Run `work` in a forked process, with its output in `log`."""
    with started(work, log) as process:
        return wait(process, log, seconds)


@contextmanager
def started(work: Callable[[], int], log: Path) -> Iterator[int]:
    """The id of a forked process that runs `work`; it is killed at the end if it still runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _run(work, log)
    try:
        yield process
    finally:
        try:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        except (ChildProcessError, ProcessLookupError):
            pass


def _run(work: Callable[[], int], log: Path) -> None:
    """The forked process, which never returns."""
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, {sys.stdout: 1, sys.stderr: 2}[stream])
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        faulthandler.disable()
        torch.set_num_threads(1)
        status = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, log: Path, seconds: float = 300) -> Ended:
    """How `process` ends, at the latest killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found, code = os.waitpid(process, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return Ended(os.waitstatus_to_exitcode(code), log.read_text(errors="replace"))


def job(folder: Path, stage: str, *extra: str) -> list[str]:
    """Flags of a job of four steps with two checkpoints; its text is in `folder`."""
    text = folder / "text.jsonl"
    if not text.exists():
        write_corpus(folder)
    return flags(folder, stage, *extra, text=str(text))


def train(folder: Path, stage: str, *extra: str, kill_at: int | None = None) -> Ended:
    """Train `stage` in `folder`; `kill_at` is a number of an operation on its files."""
    words = job(folder, stage, *extra)
    log = folder.parent / f"{folder.name}.log"
    watch = Operations(folder, kill_at, folder.parent / f"{folder.name}.operations")

    def work() -> int:
        watch.install()
        return MAIN[stage](words)

    return fork(work, log)


def count_operations(folder: Path) -> int:
    """Operations of the last `train` in `folder`."""
    return int((folder.parent / f"{folder.name}.operations").read_text())


def result(folder: Path) -> tuple[bytes, list[float], list[float]]:
    """What a finished job leaves: weights, losses, learning rates."""
    weights = (folder / "model.safetensors").read_bytes()
    return weights, logs(folder), logs(folder, "learning_rate")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_one_line(ended: Ended) -> bool:
    """A refusal: exit status 1 or 2, exactly one line of error, no traceback."""
    errors = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    return ended.status in (1, 2) and len(errors) == 1 and "Traceback" not in ended.errors


def losses_of(checkpoint: Path) -> list[float]:
    """Losses that the state of a checkpoint holds."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
