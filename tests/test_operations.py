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

# What a part must show, as a pattern in its text.
SHOWS = {
    "is there": "",
    "calls it": r"\b({operation}|{module})\(",
    "exports it": r'"{operation}"',
    "has its folder in the tree": "  {folder}/ ",
    "has its page": r"operations/{folder}\.md",
    "has its docstring": r"(?m)^::: \S+\.{operation}$",
    "defines kernels": r"@triton\.jit",
    "defines cases": r"def cases\(",
    "has shapes for the interpreter": r"\bTINY = \[\s*Shape\(",
}
# (step of CONTRIBUTING.md, file, what it must show)
PARTS = [
    (1, "calm_kernels/{folder}/README.md", "is there"),
    (2, "calm_kernels/{folder}/reference.py", "is there"),
    (3, "tests/kernels/test_{folder}*.py", "calls it"),
    (4, "calm_kernels/{folder}/eager.py", "is there"),
    (5, "calm_kernels/{folder}/api.py", "is there"),
    (5, "calm_kernels/{folder}/__init__.py", "exports it"),
    (5, "calm_kernels/__init__.py", "exports it"),
    (5, "docs/architecture.md", "has its folder in the tree"),
    (5, "mkdocs.yml", "has its page"),
    (5, "docs/reference/calm_kernels.md", "has its docstring"),
    (7, "benchmarks/bench_*.py", "calls it"),
]
PARTS_OF_TRITON = [
    (6, "calm_kernels/{folder}/*kernels.py", "defines kernels"),
    (6, "calm_kernels/{folder}/function.py", "is there"),
    (6, "calm_kernels/compiling/cases/{folder}*.py", "defines cases"),
    (6, "tests/triton/test_interpreted_{folder}*.py", "calls it"),
    (6, "tests/gpu/test_gpu_{folder}*.py", "calls it"),
    (7, "benchmarks/gpu/{folder}.py", "calls it"),
    (7, "benchmarks/gpu/{folder}.py", "has shapes for the interpreter"),
]


def folder_of(operation: str) -> str:
    """The folder whose package exports the operation."""
    names = {name: getattr(package, "__all__", ()) for name, package in PACKAGES.items()}
    return next((name for name in FOLDERS if operation in names[name]), operation)


def missing_parts(operation: str) -> Iterator[str]:
    """What the operation lacks, as lines for its author."""
    folder, is_fused = folder_of(operation), Backend.TRITON in OPERATIONS[operation]
    module = "".join(part.capitalize() for part in operation.split("_"))
    names = {"folder": folder, "operation": operation, "module": module}
    for step, pattern, shows in PARTS + PARTS_OF_TRITON * is_fused:
        place, sought = pattern.format(**names), SHOWS[shows].format(**names)
        texts = [path.read_text(encoding="utf-8") for path in ROOT.glob(place)]
        if not any(re.search(sought, text) for text in texts):
            yield f"step {step}: no {place} {shows}"
    if is_fused and not any(is_inside(name, folder) for name, _ in tuning.TABLE):
        yield f"step 6: calm_kernels/tuning.py has no row of {folder}"
    warmup = (ROOT / "calm_kernels" / "warmup.py").read_text(encoding="utf-8")
    family = [name for name in OPERATIONS if folder_of(name) == folder]
    if is_fused and not any(f'"{name}":' in warmup for name in family):
        yield f"step 6: calm_kernels/warmup.py does not run {operation}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_announced_operation_has_all_its_parts(operation):
    missing = sorted(missing_parts(operation))
    if missing:
        pytest.fail("\n".join([f"{operation} lacks (steps of CONTRIBUTING.md):", *missing]), False)


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
