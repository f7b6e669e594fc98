"""Fixtures shared by all tests."""

from contextlib import suppress

import pytest
import torch

# The tensors here are small: a second thread costs more than it brings, above all on a busy CPU.
torch.set_num_threads(1)


def pytest_addoption(parser):
    """Plain pytest, as on a GPU machine where nothing can be installed, takes our settings too."""
    with suppress(ValueError):  # pytest-timeout is installed and has said so
        parser.addini("timeout", "seconds a test may take; needs pytest-timeout")


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
