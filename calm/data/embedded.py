"""Corpora that come with every Python installation, for the demo, the tests and the examples.

| name | text | size |
| --- | --- | --- |
| ``embedded:topics`` | the language reference that ``help()`` shows, with its tables | 0.5 MB |
| ``embedded:docstrings`` | docstrings of the standard library, flattened to sentences | 1.5 MB |

Both are part of Python (PSF licence) and differ between its versions: never pin a loss to them.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from calm.errors import UserError

__all__ = [
    "EMBEDDED_CORPORA",
    "PREFIX",
    "embedded_corpus",
    "language_topics",
    "standard_library_docstrings",
]

PREFIX = "embedded:"

# Folders of the standard library that hold tests, other people's packages or bundled wheels.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)
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
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix())
    seen: dict[str, None] = {}
    for file in files:
        if SKIPPED_FOLDERS.isdisjoint(file.relative_to(folder).parts):
            for docstring in _docstrings(file):
                text = flatten(docstring)
                if len(text) >= min_characters:
                    seen.setdefault(text)
    if not seen:
        raise UserError(
            f"{PREFIX}docstrings: no sources of the standard library in {folder}; "
            "use another Python or your own text (--train_file)"
        )
    return list(seen)


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
}


def embedded_corpus(name: str) -> list[str]:
    """Documents of the embedded corpus `name`, one of `EMBEDDED_CORPORA`."""
    if name not in EMBEDDED_CORPORA:
        raise UserError(
            f"dataset_name: no corpus {name!r}; embedded: {', '.join(EMBEDDED_CORPORA)}"
        )
    return EMBEDDED_CORPORA[name]()
