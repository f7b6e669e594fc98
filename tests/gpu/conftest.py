"""Tests that need a GPU: skipped without one, run by `make test-gpu`.

Fresh memory holds NaN (or the largest integer), so an element that a kernel does not write cannot
hide.
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
def every_test_has_poisoned_memory(poisoned_memory):
    """Fresh memory holds NaN."""
