"""On a CUDA machine where nothing can be installed training starts, and what measures runs."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
# What such a machine may lack. A module that is None in sys.modules cannot be imported.
MISSING = (
    "accelerate", "datasets", "liger_kernel", "matplotlib", "pyarrow", "scoringrules",
    "xxhash",
)  # fmt: skip
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n"


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_imports():
    """Text is read, hashed and drawn by packages that are asked for then."""
    modules = ["calm", "calm.training.trainer", "calm.training.train_calm"]
    modules += [f"benchmarks.gpu.{name}" for name in ("run", "decoding", "energy_head")]
    done = run("-c", BLOCK + "\n".join(f"import {name}" for name in modules))
    assert done.returncode == 0, done.stderr


def test_hashing_names_its_package(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code = "from pathlib import Path\nfrom calm.integrity import write_manifest\n"
    done = run("-c", f"{BLOCK}{code}write_manifest(Path({str(tmp_path)!r}))")
    assert "UserError" in done.stderr and "pip install xxhash" in done.stderr


def test_gpu_tests_are_collected_by_plain_pytest():
    """Without its plugins, whose settings stand in pyproject.toml."""
    code = BLOCK + (
        "import os, pytest\nos.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\n"
        "raise SystemExit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', "
        "'tests/gpu']))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu_energy_score.py" in done.stdout


def test_a_missing_git_is_no_error(monkeypatch):
    from benchmarks.machine import current_commit

    monkeypatch.setenv("PATH", "")
    assert current_commit() == ""
