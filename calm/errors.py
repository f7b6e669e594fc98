"""Errors and notices for the user, and the one place where errors become lines.

`run_program` runs a command, or a training program under `python -m` or torchrun. An error that the
user can mend becomes one line on standard error, wherever it arose: here, in a worker of a data
loader or of a process pool, or in a library with a class of its own for a full disk. Any other
error is a fault of this code and keeps its traceback.
"""

import json
import os
import pickle
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

__all__ = [
    "UserError",
    "UserNotice",
    "message_of",
    "one_line",
    "run_program",
    "show_tracebacks",
]

SUCCESS, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130

# Whether to show where an error that becomes one line comes from.
show_tracebacks: ContextVar[bool] = ContextVar("show_tracebacks", default=False)


class UserError(ValueError):
    """Bad input, configuration or data; the command line prints it as one line and exits with 2."""


class UserNotice(UserWarning):
    """What a user should know but need not mend; the command line prints it as one line."""


# Errors that the user can mend. calm_kernels raises ValueError: it does not import `UserError`.
MENDABLE = (
    ValueError, OSError, NotImplementedError, ImportError, MemoryError, pickle.UnpicklingError
)  # fmt: skip
# torch's own words would advise to run the code.
REFUSED_PICKLE = "a pickle file is damaged, or would run code, which does not happen here"
# What libraries report in classes of their own (safetensors, torch, datasets), and what it means.
OF_THE_MACHINE = {
    re.compile(
        r"No space left on device|os error 28\b|Disk quota exceeded|os error 122\b"
        r"|PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs"
    ): "the disk is full: free some space, or choose another folder",
    re.compile(r"out of memory|(?i:can(?:'t|not) allocate memory)|os error 12\b"): (
        "out of memory: take smaller batches, blocks or models"
    ),
    re.compile(
        r"worker.* exited unexpectedly|subprocesses has abruptly died"
        r"|process pool (?:was terminated|is not usable)"
    ): ("a worker process was killed, most often for lack of memory: take fewer workers"),
}
# A data loader hands on the error of a worker as a text with the worker's traceback.
OF_A_WORKER = re.compile(r"Caught (\w+) in [^\n]*\nOriginal Traceback ")
# datasets wraps the error of a reader, and says nothing of it.
WRAPPERS = ("DatasetGenerationError",)


def message_of(error: BaseException) -> str:
    """What `error` says, without the wrappings in which the error of a worker arrives."""
    error = _unwrapped(error)
    text = REFUSED_PICKLE if isinstance(error, pickle.UnpicklingError) else str(error)
    if type(error).__name__.endswith("RemoteTraceback"):  # of a process pool, first error first
        last_line = text.strip('"\n').split("\n\n")[0].splitlines()[-1]
        return last_line.partition(": ")[2] or last_line
    wrapped = OF_A_WORKER.match(text)
    if wrapped is None:
        return text
    # The traceback may show other errors before; the last one is what was raised.
    name = re.compile(rf"^(?:[\w.]+\.)?{wrapped.group(1)}(?:: |$)", re.MULTILINE)
    return name.split(text)[-1].removesuffix("\n")


def _unwrapped(error: BaseException) -> BaseException:
    while type(error).__name__ in WRAPPERS and error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str | None:
    """The error as one line, or None if it is not one that the user can mend."""
    message = " ".join(message_of(error).split())
    error = _unwrapped(error)
    if isinstance(error, UserError):
        return message
    for pattern, meaning in OF_THE_MACHINE.items():
        if pattern.search(message):
            return f"{meaning} ({message})"
    if type(error).__module__.partition(".")[0] == "httpx":  # of the hub's client
        return f"no connection to the hub: {message or type(error).__name__}"
    return (message or type(error).__name__) if isinstance(error, MENDABLE) else None


def run_program(work: Callable[[], int], *, command: str = "calm", extras: str = "") -> int:
    """The exit status of `work`, after one line for an error that the user can mend.

    Under torchrun the launcher learns the line too, and ends its report with it.

    Args:
        work: returns an exit status.
        command: what the user has called, for a package that is not installed.
        extras: of this package, which would install what the command needs.

    Returns: what `work` returns; 0 if the reader of its output has ended; 2 after an error that the
        user can mend; 130 after Ctrl-C.

    Raises:
        Exception: any other error.
    """
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has ended, as in `calm env | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as error:
        line = one_line(error)
        if line is None:
            _tell_launcher(f"{type(error).__name__}: {error}")
            raise
        if isinstance(error, ModuleNotFoundError) and extras:
            line = f"`{command}` needs {error.name}, which is not installed: "
            line += f"pip install 'calm-lm[{extras}]'"
        if show_tracebacks.get():
            traceback.print_exc()
        sys.stderr.write(f"error: {line}\n")
        _tell_launcher(f"error: {line}")
        return EXIT_USER_ERROR


def _tell_launcher(message: str) -> None:
    """Hand `message` to torchrun: its long report of failed processes then ends with it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    # The report ends with the earliest failure, in whole seconds. Processes that torchrun stops
    # because of this one fail in the same second; one second less puts this one last.
    details = {"timestamp": str(int(time.time()) - 1)}
    report = {"message": {"message": message, "extraInfo": details}}
    Path(file).write_text(json.dumps(report), encoding="utf-8")
