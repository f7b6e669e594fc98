"""Modules run as programs, each in a process of its own that starts with the imports done.

A server imports torch and transformers once and forks for each program. The seconds of that import
would otherwise be spent by every stage of a campaign. A program that faults, hangs or exhausts its
memory still ends alone.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["ROOT", "import_beforehand", "run_module"]

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")


def import_beforehand(modules: Sequence[str]) -> None:
    """What the server imports; to be called before the first program. None may be a program."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    _CONTEXT.set_forkserver_preload(list(modules))


def run_module(module: str, arguments: Sequence[str], log: Path, limit: float) -> int | None:
    """Run ``python -m module arguments`` in this project's folder.

    Args:
        module: of a program.
        arguments: its command line.
        log: file that takes what it prints.
        limit: seconds, after which it is killed with all that it has started.

    Returns: the exit status, negative for a signal, None if it was killed at its limit.
    """
    process = _CONTEXT.Process(target=_execute, args=(module, tuple(arguments), str(log)))
    process.start()
    process.join(limit)
    is_over = process.exitcode is not None
    _kill(process)
    return process.exitcode if is_over else None


def _kill(process: BaseProcess) -> None:
    """End the program's session: a child that outlived it would hold the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()


def _execute(module: str, arguments: Sequence[str], log: str) -> None:
    """In the new process."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.chdir(ROOT)
    if _lost_its_gpu():
        os.execv(sys.executable, [sys.executable, "-u", "-m", module, *arguments])
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _lost_its_gpu() -> bool:
    """Whether an import of the server has touched CUDA, which does not survive a fork."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()
