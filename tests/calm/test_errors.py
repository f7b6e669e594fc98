"""Where errors become lines: workers, libraries with classes of their own, faults of this code."""

import errno
import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from calm.errors import UserError, message_of, one_line, run_program, show_tracebacks


class Broken(torch.utils.data.IterableDataset):
    """A text whose third line cannot be read, as a worker meets it."""

    def __iter__(self):
        yield from (1, 2)
        try:
            json.loads("{")
        except ValueError as error:
            raise UserError("books.jsonl, line 3: no JSON;\nmend the line") from error


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_loader_worker_is_the_same_line(workers):
    with pytest.raises(UserError) as caught:
        list(DataLoader(Broken(), batch_size=1, num_workers=workers))
    assert ("Traceback" in str(caught.value)) == bool(workers)
    assert one_line(caught.value) == "books.jsonl, line 3: no JSON; mend the line"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a: b"), "a: b"),
        (KeyError("text"), "'text'"),
        (OSError(2, "gone", "x"), "[Errno 2] gone: 'x'"),
    ],
    ids=["user", "key", "os"],
)
def test_wrapped_errors_say_what_was_raised(error, message):
    try:
        raise error
    except Exception:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as caught:
        wrapped.reraise()
    assert message_of(caught.value) == message


def test_an_error_of_a_reader_comes_out_of_the_wrapping_of_datasets():
    from datasets.exceptions import DatasetGenerationError

    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = UserError("books.jsonl, line 3: no JSON")
    assert one_line(error) == "books.jsonl, line 3: no JSON"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        SafetensorError("Error while serializing: IoError(Os { code: 28, ... }) (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
    ids=["os", "safetensors", "torch", "torch at the end"],
)
def test_a_full_disk_is_one_line_whichever_library_meets_it(error):
    assert one_line(error).startswith("the disk is full: free some space")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 400 bytes. Error code 12"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["host", "device"],
)  # fmt: skip
def test_memory_that_is_not_there(error):
    assert one_line(error).startswith("out of memory: take smaller")


def test_a_pickle_that_would_run_code():
    error = pickle.UnpicklingError("set weights_only=False, only if you trust the source")
    assert one_line(error).startswith("a pickle file is damaged, or would run code")


def test_a_worker_that_was_killed():
    error = RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")
    assert one_line(error).startswith("a worker process was killed")


@pytest.mark.parametrize("error", [RuntimeError("shape"), TypeError("x"), ZeroDivisionError()])
def test_a_fault_of_this_code_keeps_its_traceback(error):
    assert one_line(error) is None

    def work():
        raise error

    with pytest.raises(type(error)):
        run_program(work)


def test_exit_status_and_line(capsys):
    def work():
        raise ValueError("a\n  b")

    assert run_program(lambda: 7) == 7
    assert run_program(work) == 2
    assert capsys.readouterr().err == "error: a b\n"
    shown = show_tracebacks.set(True)
    assert run_program(work) == 2
    show_tracebacks.reset(shown)
    assert capsys.readouterr().err.startswith("Traceback")


def test_interruption(capsys):
    def work():
        raise KeyboardInterrupt

    assert run_program(work) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_package_that_is_not_installed(capsys):
    def work():
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    assert run_program(work, command="calm train", extras="train") == 2
    line = "`calm train` needs datasets, which is not installed: pip install 'calm-lm[train]'"
    assert capsys.readouterr().err == f"error: {line}\n"


def test_newer_clients_of_the_hub_have_errors_of_their_own():
    """httpx's are no OSError."""
    error = type("ConnectError", (Exception,), {"__module__": "httpx._exceptions"})("no route")
    assert one_line(error) == "no connection to the hub: no route"
