"""Corpora that need no download, for the demo, the experiments, the tests and the examples.

| name | text | size |
| --- | --- | --- |
| ``embedded:topics`` | the language reference that ``help()`` shows, with its tables | 0.5 MB |
| ``embedded:docstrings`` | docstrings of the standard library, flattened to sentences | 1.5 MB |
| ``embedded:sources`` | source files of the standard library, to score on | 11 MB |
| ``embedded:packages`` | likewise of `PACKAGES`, which are installed with calm | 21 MB |

The first three are part of Python (PSF licence), the last of packages with their own licences (most
BSD or Apache 2.0). All differ between versions: never pin a loss to them.
"""

import ast
import hashlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from calm.errors import UserError, UserNotice
from calm.integrity import write_atomically
from calm.progress_bar import progress_bar

__all__ = [
    "EMBEDDED_CORPORA",
    "PREFIX",
    "TEXT_LICENCES",
    "check_embedded",
    "embedded_corpus",
    "embedded_stamp",
    "language_topics",
    "package_docstrings",
    "standard_library_docstrings",
    "standard_library_sources",
]

PREFIX = "embedded:"

# Folders of the standard library that hold tests, other people's packages or bundled wheels.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)
# What calm is installed with, directly or through another: each by the name that is imported.
PACKAGES = (
    "torch", "transformers", "numpy", "datasets", "accelerate", "tokenizers", "huggingface_hub",
    "einops", "pandas", "pyarrow", "sympy", "networkx", "matplotlib", "fsspec", "jinja2",
)  # fmt: skip
PACKAGE_CACHE = Path(HF_HOME) / "calm"
MIN_CHARACTERS = 80
LONG_RUN = re.compile(r"([^\w\s])\1{3,}")


def language_topics() -> list[str]:
    """The topics of Python's language reference, in alphabetical order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def standard_library_docstrings(min_characters: int = MIN_CHARACTERS) -> list[str]:
    """Distinct docstrings of the standard library, each on one line, in the order of file names.

    Sources are parsed, never imported. Interactive examples and rulers are dropped and each run of
    white space becomes one space, so most of what remains is sentences.

    Args:
        min_characters: shorter docstrings are skipped.

    Raises:
        UserError: this Python carries no sources of its standard library.
    """
    return _documents(_library_sources(), min_characters)


def package_docstrings() -> list[str]:
    """Distinct docstrings of `PACKAGES`, as `standard_library_docstrings`, package by package.

    Packages that are not installed are skipped, and named in a `UserNotice`. To parse them takes
    some minutes. The result is kept in the folder ``calm`` of the cache of Hugging Face
    (``HF_HOME``) until a version changes.

    Raises:
        UserError: none of them is installed with its sources.
    """
    cached = PACKAGE_CACHE / f"docstrings-{_package_stamp()}.json"
    try:
        documents: list[str] = json.loads(cached.read_text(encoding="utf-8"))
        return documents
    except (OSError, ValueError):  # not there, or damaged
        pass
    folders = {name: _package_folder(name) for name in PACKAGES}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        _notice(f"without {', '.join(missing)}: not installed")
    files = [file for folder in folders.values() if folder for file in _sources(folder)]
    _notice(f"reading {len(files)} source files; it takes some minutes, the first time only")
    bar = progress_bar(files, desc=f"{PREFIX}packages", unit=" files")
    documents = _documents(bar, MIN_CHARACTERS)
    if not documents:
        raise UserError(
            f"{PREFIX}packages: no sources of {', '.join(PACKAGES)}; use your own text (--data)"
        )
    try:
        PACKAGE_CACHE.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, json.dumps(documents, ensure_ascii=False))
    except OSError as error:
        _notice(f"not kept for the next time: {error}")
    return documents


def standard_library_sources() -> list[str]:
    """Source files of the standard library, in a fixed order that mixes its packages."""
    texts = []
    for file in sorted(
        _library_sources(), key=lambda file: hashlib.blake2b(file.name.encode()).digest()
    ):
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):  # a few library files are broken on purpose
            continue
    return [text for text in texts if text.strip()]


def _notice(message: str) -> None:
    warnings.warn(f"{PREFIX}packages: {message}", UserNotice, stacklevel=3)


def _package_folder(name: str) -> Path | None:
    """Where the sources of a package are; None if it is not installed. Imports nothing."""
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _package_stamp() -> str:
    """Hash of the versions of `PACKAGES` and of the code that reads them."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} none")
    rules = Path(__file__).read_bytes()
    digest = hashlib.blake2b(" ".join(versions).encode() + rules, digest_size=8)
    return digest.hexdigest()


def _library_sources() -> list[Path]:
    """`_sources` of the standard library; an error if this Python carries none."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = _sources(folder)
    if not files:
        raise UserError(
            f"no sources of the standard library in {folder}; use another Python or your own text "
            "(--train_file)"
        )
    return files


def _sources(folder: Path) -> list[Path]:
    """Python files in `folder` without its tests, in the order of their names."""
    files = sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix())
    return [f for f in files if SKIPPED_FOLDERS.isdisjoint(f.relative_to(folder).parts)]


def _documents(files: Iterable[Path], min_characters: int) -> list[str]:
    """Distinct flattened docstrings of `files` that are long enough."""
    texts = (flatten(docstring) for file in files for docstring in _docstrings(file))
    return list(dict.fromkeys(text for text in texts if len(text) >= min_characters))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in other people's strings
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # a few library files are broken on purpose
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            yield docstring


def flatten(docstring: str) -> str:
    """`docstring` on one line, without interactive examples and runs of punctuation."""
    lines = [line.strip() for line in docstring.splitlines()]
    kept = [line for line in lines if not line.startswith((">>>", "..."))]
    return " ".join(LONG_RUN.sub(" ", " ".join(kept)).split())


EMBEDDED_CORPORA: dict[str, Callable[[], list[str]]] = {
    f"{PREFIX}topics": language_topics,
    f"{PREFIX}docstrings": standard_library_docstrings,
    f"{PREFIX}sources": standard_library_sources,
    f"{PREFIX}packages": package_docstrings,
}


OF_PYTHON = (
    "It is part of Python, under the licence PSF-2.0 (https://docs.python.org/3/license.html)."
)
# Whose text a corpus is, in a sentence, for cards of models.
TEXT_LICENCES = {
    **{PREFIX + name: OF_PYTHON for name in ("topics", "docstrings", "sources")},
    f"{PREFIX}packages": "It is part of packages that are installed with calm, under the licence "
    "of each, most of them BSD or Apache 2.0.",
}


def check_embedded(name: str) -> None:
    """Raise a `UserError` unless `name` is one of `EMBEDDED_CORPORA`."""
    if name not in EMBEDDED_CORPORA:
        raise UserError(
            f"dataset_name: no corpus {name!r}; embedded: {', '.join(EMBEDDED_CORPORA)}"
        )


def embedded_corpus(name: str) -> list[str]:
    """Documents of the embedded corpus `name`, one of `EMBEDDED_CORPORA`."""
    check_embedded(name)
    return EMBEDDED_CORPORA[name]()


def embedded_stamp(name: str) -> str:
    """Changes with the documents of the embedded corpus `name`."""
    if name == f"{PREFIX}packages":
        return _package_stamp()
    return platform.python_version()
