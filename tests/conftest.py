"""Fixtures shared by all tests."""

import os
from contextlib import suppress

import pytest
import torch

# The tensors here are small: a second thread costs more than it brings, above all on a busy CPU.
torch.set_num_threads(1)


def pytest_addoption(parser):
    """Plain pytest, as on a GPU machine where nothing can be installed, takes our settings too."""
    with suppress(ValueError):  # pytest-timeout is installed and has said so
        parser.addini("timeout", "seconds a test may take; needs pytest-timeout")


@pytest.hookimpl(trylast=True)  # of the tests that were selected
def pytest_collection_modifyitems(items):
    """Long tests first: one that starts last leaves the other processes idle.

    Each process of pytest-xdist begins with a part of the list, and at its end takes over what
    others have not begun.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long, others = [], []
    for item in items:
        is_long = any(item.get_closest_marker(name) for name in ("slow", "long", "timeout"))
        (long if is_long else others).append(item)
    bounds = [len(others) * worker // workers for worker in range(workers + 1)]
    items[:] = [
        item
        for worker in range(workers)
        for item in long[worker::workers] + others[bounds[worker] : bounds[worker + 1]]
    ]


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    """Every backend that runs on any device."""
    return request.param


@pytest.fixture
def generator():
    """A generator of its own: a test's draws do not depend on which tests ran before."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Every new tensor starts as NaN (or the largest integer): an element not written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")  # without the inductor, whose import takes seconds
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode("default")
