"""The kernels in Triton's interpreter: collected only where TRITON_INTERPRET is set.

Triton decides when a kernel is defined whether it is compiled or interpreted, so these tests need a
process of their own: tests/kernels/test_triton_interpreter.py starts it. Fresh memory holds NaN (or
the largest integer), so an element that a kernel does not write cannot hide.
"""

import sys
from pathlib import Path

import pytest

from calm_kernels.backend import is_interpreted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))  # energy_cases

if is_interpreted():
    from quick_interpreter import quicken

    quicken()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Triton 3.6's interpreter reads loop bounds in a way that NumPy 2.4 refuses."""
    for item in items:
        if "tests/triton/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"))


@pytest.fixture(autouse=True)
def every_test_has_poisoned_memory(poisoned_memory):
    """Fresh memory holds NaN."""
