"""Threads of a CPU for small operations."""

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from calm_kernels.backend import threads_sleep

__all__ = ["MIN_MULTIPLICATIONS", "one_thread", "threads_for", "threads_spin"]


MIN_MULTIPLICATIONS = 2**20  # of work that a second thread is worth waking for
_SLEEP = threads_sleep()  # OpenMP reads it once, too


def threads_spin() -> bool:
    """Whether there are other threads that wait awake, and take a share of small work at once."""
    return not _SLEEP and torch.get_num_threads() > 1


def _is_alone() -> bool:
    """Whether no other Python thread could begin work with torch.

    The monitor of tqdm's progress bars, which loading a model starts, does none.
    """
    if threading.active_count() == 1:
        return True
    own = threading.current_thread()
    return all(
        other is own or type(other).__name__ == "TMonitor" for other in threading.enumerate()
    )


class one_thread:
    """A context in which torch keeps to one thread, for work that is over before a second wakes.

    A thread that sleeps takes some 50 microseconds to wake (``OMP_WAIT_POLICY=PASSIVE``, or a pause
    since its last work); torch and MKL split operations that take a fifth of that. Entering and
    leaving costs less than an operation. The count is the whole process's: where other Python
    threads run, which might begin with it, nothing changes.
    """

    def __enter__(self) -> None:
        self._count = torch.get_num_threads() if _is_alone() else 1
        if self._count > 1:
            torch.set_num_threads(1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._count > 1:
            torch.set_num_threads(self._count)


def threads_for(multiplications: int, inputs: Tensor) -> AbstractContextManager[None]:
    """`one_thread` for an operation of few multiplications on CPU tensors, else all of them."""
    is_small = inputs.device.type == "cpu" and multiplications < MIN_MULTIPLICATIONS
    return one_thread() if is_small and not torch.compiler.is_compiling() else nullcontext()
