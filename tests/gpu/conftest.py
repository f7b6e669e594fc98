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
            # A GPU machine has packages that nobody chose: what they warn of is shown.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def every_test_has_poisoned_memory(poisoned_memory):
    """Fresh memory holds NaN."""
