"""Programs in processes of their own that start with torch and `calm` imported.

torchrun would import them for each process again, for several seconds. They are forked from one
server instead; torchrun itself is tested where it is named.
"""

import multiprocessing
import os
import socket
from multiprocessing.connection import wait

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["calm.training.train_autoencoder", "calm.training.train_calm"])


def start(log, function, *arguments, **environment):
    """A process that calls `function`, whose status is its own; `log` gets what it prints."""
    process = _CONTEXT.Process(target=_call, args=(str(log), function, arguments, environment))
    process.start()
    return process


def _call(log, function, arguments, environment):
    """In the new process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    raise SystemExit(function(*arguments))


def run_in_two(folder, function, *arguments):
    """`run_in` two processes."""
    run_in(2, folder, function, *arguments)


def run_in(count, folder, function, *arguments):
    """Call `function` in processes that torch.distributed joins; all must succeed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = [
        start(log, function, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank, log in enumerate(logs)
    ]
    while not any(process.exitcode for process in processes):
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not running:
            return
        wait(running)
    for process in processes:  # where one failed, the other waits for it
        process.kill()
        process.join()
    raise AssertionError("".join(log.read_text() for log in logs))
