"""The kernels in Triton's interpreter: collected only where TRITON_INTERPRET is set.

Triton decides when a kernel is defined whether it is compiled or interpreted, so these tests need a
process of their own: tests/kernels/test_triton_interpreter.py starts it.
"""

import sys
from pathlib import Path

from calm_kernels.backend import is_interpreted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))  # energy_cases

if not is_interpreted():
    collect_ignore_glob = ["test_*.py"]
