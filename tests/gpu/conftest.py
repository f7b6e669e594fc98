"""Tests that need a GPU: skipped without one, run by `make test-gpu`.

Fresh memory holds NaN, so an element that a kernel does not write cannot hide.
"""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32"))
            # said once, by whichever test first asks for errors where the host would wait
            item.add_marker(pytest.mark.filterwarnings("ignore:Synchronization debug mode"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every new tensor starts as NaN (or the largest integer)."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
