"""The rules that keep the code readable: imports, sizes, documentation of public names."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from import_graph import circles, import_graph, imports, is_inside, modules_below

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCES = sorted(
    path
    for folder in ("calm_kernels", "calm", "benchmarks", "tests", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGE_SOURCES = [path for path in SOURCES if path.parts[len(ROOT.parts)].startswith("calm")]
MODULES = modules_below(ROOT / "calm") | modules_below(ROOT / "calm_kernels")
# Modules that import by a name they compute -> the package it is in, or None where the names stand
# in the file as strings.
DISPATCHERS = {
    "calm.cli": None,
    "calm_kernels.compiling.configurations": "calm_kernels.compiling.cases",
}

ABOVE_PLAN = (
    "calm.experiments",
    "calm.serving",
    "calm.commands",
    "calm.cli",
    "calm.integrations",
)
ABOVE_TRAINING = ("calm.plan", "calm.training_memory", *ABOVE_PLAN)
ABOVE_MODELS = ("calm.flops", "calm.evaluation", "calm.training", *ABOVE_TRAINING)
# Folder of the importing file -> packages it must never import, from the lowest layer upwards.
FORBIDDEN = {
    "calm_kernels": ("calm", "transformers", "numpy", "einops"),
    "calm/errors.py": ("calm", "calm_kernels"),
    "calm/integrity.py": (
        "calm.layers",
        "calm.data",
        "calm.decoding",
        "calm.models",
        *ABOVE_MODELS,
    ),
    "calm/pretrained": (
        "calm.configuration",
        "calm.data",
        "calm.decoding",
        "calm.integrity",
        "calm.models",
        *ABOVE_MODELS,
    ),
    "calm/labels.py": ("calm.layers", "calm.decoding", "calm.models", *ABOVE_MODELS),
    "calm/configuration": ("calm.layers", "calm.decoding", "calm.models", *ABOVE_MODELS),
    "calm/data": ("calm.decoding", "calm.models", *ABOVE_MODELS),
    "calm/decoding": ("calm.models", *ABOVE_MODELS),
    "calm/decoding/text": ("calm.decoding.sampling", "calm.decoding.engine"),
    "calm/decoding/sampling": ("calm.decoding.text", "calm.decoding.engine"),
    "calm/decoding/engine": ("calm.decoding.text",),
    "calm/models": ABOVE_MODELS,
    "calm/flops.py": ("calm.evaluation", "calm.training", *ABOVE_TRAINING),
    "calm/evaluation": ("calm.training", *ABOVE_TRAINING),
    "calm/training/": ABOVE_TRAINING,
    "calm/plan.py": ("calm.training_memory", *ABOVE_PLAN),
    "calm/training_memory.py": ABOVE_PLAN,
    "calm/experiments": ("calm.serving", "calm.commands", "calm.cli", "calm.integrations"),
    "calm/serving": ("calm.models", *(set(ABOVE_MODELS) - {"calm.serving"})),
    "calm/commands": ("calm.cli", "calm.integrations"),
}
# Module -> the package of an extra that it needs; its own tests import it where that is installed.
NEEDS = {"calm.integrations.lm_eval": "lm_eval"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, at any depth, by whichever means."""
    found = imports(path.read_text(encoding="utf-8"), MODULES)
    return (name for name, _ in found if name is not None)


def test_no_imports_form_a_circle():
    found = circles(import_graph(MODULES, DISPATCHERS))
    assert not found, "\n".join(["circles of imports (module:line -> ...):", *found])


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_layers_import_downwards_only(folder):
    files = [path for path in PACKAGE_SOURCES if relative(path).startswith(folder)]
    assert files, f"no sources under {folder}"
    for path in files:
        for module in imported(path):
            for package in FORBIDDEN[folder]:
                assert not is_inside(module, package), f"{relative(path)} imports {module}"


def test_only_the_backend_module_reads_the_environment():
    for path in PACKAGE_SOURCES:
        if relative(path).startswith("calm_kernels/") and path.name != "backend.py":
            source = path.read_text(encoding="utf-8")
            assert "os.environ" not in source and "getenv" not in source, relative(path)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calm_kernels_imports_without_triton_and_without_calm():
    folders = [path.parent.name for path in (ROOT / "calm_kernels").glob("*/api.py")]
    names = [f"calm_kernels.{folder}.{part}" for folder in folders
             for part in ("api", "reference", "eager")]  # fmt: skip
    run_python(
        "import sys, importlib\n"
        "sys.modules['triton'] = None\n"
        "import calm_kernels\n"
        f"[importlib.import_module(name) for name in {names!r}]\n"
        "others = ('calm', 'transformers', 'einops')\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in others]\n"
        "assert not loaded, loaded\n"
    )


def test_importing_calm_loads_neither_triton_nor_training():
    run_python(
        "import sys, calm\n"
        "loaded = [m for m in sys.modules if m.startswith(('calm.training', 'calm.experiments', "
        "'matplotlib', 'datasets', 'calm_kernels.device', 'calm_kernels.tuning'))\n"
        "          or m.startswith('calm_kernels') and m.endswith(('kernels', 'function'))\n"
        "          and m != 'calm_kernels']\n"
        "assert not loaded, loaded\n"
    )


def modules_of(package_name: str) -> Iterator[str]:
    package = importlib.import_module(package_name)
    yield package_name
    for info in pkgutil.walk_packages(package.__path__, package_name + "."):
        if info.name in NEEDS and find_spec(NEEDS[info.name]) is None:
            continue
        if not info.name.endswith((".kernels", ".function", "__main__")):
            yield info.name


@pytest.mark.parametrize("package", ["calm_kernels", "calm"])
def test_public_names_are_documented_and_typed(package):
    for module_name in modules_of(package):
        module = importlib.import_module(module_name)
        assert module.__doc__, f"{module_name} says nothing about itself"
        for name in getattr(module, "__all__", ()):
            public = getattr(module, name)
            if not (inspect.isfunction(public) or inspect.isclass(public)):
                continue
            assert public.__doc__, f"{module_name}.{name} has no docstring"
            if inspect.isfunction(public):
                signature = inspect.signature(public)
                untyped = [p.name for p in signature.parameters.values()
                           if p.annotation is inspect.Parameter.empty]  # fmt: skip
                assert not untyped, f"{module_name}.{name}: no type for {untyped}"
                assert signature.return_annotation is not inspect.Signature.empty, name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES, f"{relative(path)}: look for the seam"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= MAX_FUNCTION_LINES, f"{relative(path)}: {node.name} is {length} lines"


SUPPRESSION = re.compile(r"#\s*(?:noqa|type:\s*ignore)\b(?::\s*[A-Z0-9, ]+|\[[^]]*\])?")


def unexplained(source: str) -> list[int]:
    """Lines whose comment switches a check off and says nothing else."""
    comments = (
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and SUPPRESSION.search(token.string)
    )
    return [
        token.start[0]
        for token in comments
        if len(SUPPRESSION.sub("", token.string).split()) < 2  # a hash is no reason
    ]


def test_every_suppression_gives_its_reason():
    bad = "x = 1  # noqa\nx = 1  # type: ignore[assignment]  # noqa: E501, E731\n"
    good = "x = 1  # type: ignore[misc] # as it is\nx = '# noqa'\nx = 1  # noqa: E501 - one word\n"
    assert unexplained(bad + good) == [1, 2]
    for path in SOURCES:
        lines = unexplained(path.read_text(encoding="utf-8"))
        assert not lines, f"{relative(path)}:{lines[0]}: say why the check does not apply"


def files_in_the_tree() -> dict[str, set[str]]:
    """Folder -> the Python files that the tree in docs/architecture.md names there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found, folders = {}, []
    for line in page.partition("## Files")[2].split("```")[1].splitlines():
        entry = line.lstrip()
        depth = (len(line) - len(entry)) // 2
        folders = folders[:depth]
        if match := re.match(r"\w+/", entry):
            folders.append(match[0])
        found.setdefault("".join(folders), set()).update(re.findall(r"\b\w+\.py\b", entry))
    return found


def test_the_tree_names_every_package_file_and_no_other():
    tree = files_in_the_tree()
    for path in PACKAGE_SOURCES:
        folder = relative(path.parent) + "/"
        assert folder in tree, f"docs/architecture.md lacks {folder}"
        is_operation = (path.parent / "api.py").is_file()  # one line for the folder
        if path.name != "__init__.py" and not is_operation:
            assert path.name in tree[folder], f"docs/architecture.md lacks {relative(path)}"
    for folder, names in tree.items():
        for name in names:
            assert (ROOT / folder / name).is_file(), f"docs/architecture.md: no {folder}{name}"
