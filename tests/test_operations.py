"""Every announced operation has all its parts: CONTRIBUTING.md lists them, in the same steps."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import imports, is_inside, modules_below

from calm_kernels import tuning
from calm_kernels.backend import OPERATIONS, Backend

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / "calm_kernels").glob("*/api.py"))
PACKAGES = {name: importlib.import_module(f"calm_kernels.{name}") for name in FOLDERS}

# (step, file, what it must contain); {folder}, {call}: the operation's folder; a call of it.
PARTS = [
    (1, "calm_kernels/{folder}/README.md", ""),
    (2, "calm_kernels/{folder}/reference.py", ""),
    (3, "tests/kernels/test_{folder}*.py", "{call}"),
    (4, "calm_kernels/{folder}/eager.py", ""),
    (5, "calm_kernels/{folder}/api.py", ""),
    (5, "calm_kernels/{folder}/__init__.py", ""),
    (5, "calm_kernels/__init__.py", r'"{operation}"'),
    (5, "docs/architecture.md", "  {folder}/ "),
    (7, "benchmarks/bench_*.py", "{call}"),
]
PARTS_OF_TRITON = [
    (6, "calm_kernels/{folder}/*kernels.py", r"@triton\.jit"),
    (6, "calm_kernels/{folder}/function.py", ""),
    (6, "calm_kernels/compiling/cases/{folder}*.py", r"def cases\("),
    (6, "tests/triton/test_interpreted_{folder}*.py", "{call}"),
    (6, "tests/gpu/test_gpu_{folder}*.py", "{call}"),
    (7, "benchmarks/gpu/{folder}.py", "{call}"),
    (7, "tests/triton/test_interpreted_benchmark.py", r"\b{folder}\.Shape\("),
]


def folder_of(operation: str) -> str:
    """The folder whose package exports the operation."""
    names = {name: getattr(package, "__all__", ()) for name, package in PACKAGES.items()}
    return next((name for name in FOLDERS if operation in names[name]), operation)


def missing_parts(operation: str) -> Iterator[str]:
    """What the operation lacks, as lines for its author."""
    folder, is_fused = folder_of(operation), Backend.TRITON in OPERATIONS[operation]
    module = "".join(part.capitalize() for part in operation.split("_"))  # calls it as well
    names = {"folder": folder, "operation": operation, "call": rf"\b({operation}|{module})\("}
    for step, pattern, content in PARTS + PARTS_OF_TRITON * is_fused:
        files = sorted(ROOT.glob(pattern.format(**names)))
        sought = content.format(**names)
        if not any(re.search(sought, path.read_text(encoding="utf-8")) for path in files):
            what = f" with {sought}" if sought else ""
            yield f"step {step}: {pattern.format(**names)}{what}"
    if is_fused and not any(is_inside(name, folder) for name, _, _ in tuning.TABLE):
        yield f"step 6: a row of {folder} in calm_kernels/tuning.py"
    warmed_up = (ROOT / "calm_kernels" / "warmup.py").read_text(encoding="utf-8")
    family = [name for name in OPERATIONS if folder_of(name) == folder]
    if is_fused and not any(f'"{name}":' in warmed_up for name in family):
        yield f"step 6: {operation} in calm_kernels/warmup.py"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_announced_operation_has_all_its_parts(operation):
    missing = list(missing_parts(operation))
    assert not missing, "\n".join([f"{operation} lacks (steps of CONTRIBUTING.md):", *missing])


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_announced_and_describes_its_files(folder):
    assert any(folder_of(name) == folder for name in OPERATIONS), (
        f"calm_kernels/{folder} holds no operation of calm_kernels/backend.py: OPERATIONS"
    )
    readme = (ROOT / "calm_kernels" / folder / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "calm_kernels" / folder).glob("*.py"):
        assert path.name == "__init__.py" or path.name in readme, (
            f"calm_kernels/{folder}/README.md lacks a line for {path.name}"
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_operations_are_independent_and_their_references_stand_alone(folder):
    own = f"calm_kernels.{folder}"
    others = [f"calm_kernels.{other}" for other in FOLDERS if other != folder]
    modules = modules_below(ROOT / "calm_kernels")
    for path in (ROOT / "calm_kernels" / folder).glob("*.py"):
        for module, line in imports(path.read_text(encoding="utf-8"), modules):
            place = f"calm_kernels/{folder}/{path.name}:{line} imports {module}"
            assert not any(is_inside(module, other) for other in others), place
            assert module != f"{own}.reference" or path.name == "api.py", place
            assert path.name != "reference.py" or not is_inside(module, own), place
