"""Files of text: which paths a flag names, and of which kind a file is.

| kind | files |
| --- | --- |
| ``jsonl`` | ``.jsonl`` |
| ``json`` | ``.json`` |
| ``parquet`` | ``.parquet`` |
| ``text`` | every other file, such as ``.txt``, ``.md`` and ``.py``, unless known to be binary |

Upper case works too, and so does all but Parquet compressed with gzip or Zstandard
(``.jsonl.gz``, ``.jsonl.zst``).
"""

import glob
import warnings
from pathlib import Path
from typing import Literal

from calm.errors import UserError, UserNotice

__all__ = [
    "BYTE_ORDER_MARK",
    "DATA_SUFFIXES",
    "PACKED",
    "FileKind",
    "expand_files",
    "file_kind",
    "file_stamp",
    "file_suffix",
    "names_files",
    "without_mark",
]

BYTE_ORDER_MARK = "\ufeff"
FileKind = Literal["text", "jsonl", "json", "parquet"]

KINDS: dict[str, FileKind] = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".csv", ".tsv", ".py", ".html", ".xml", ".log")
PACKED = (".gz", ".zst")  # files of these endings are unpacked as they are read
# Files that may hold text, but none that can be read as it is.
COMPRESSED = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".lz4")
DOCUMENTS = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ppt", ".pptx")
TABLES = (".arrow", ".feather", ".orc", ".avro", ".sqlite", ".db")
ARRAYS = (".bin", ".pt", ".pth", ".safetensors", ".npy", ".npz", ".pkl", ".pickle")
MEDIA = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".wav", ".mp4")
BINARY = frozenset(COMPRESSED + DOCUMENTS + TABLES + ARRAYS + MEDIA)
DATA_SUFFIXES = (*KINDS, ".txt")  # of files that make a folder a dataset
MAGIC = frozenset("*?[")
SNIFFED_BYTES = 4096


def file_kind(path: str | Path) -> FileKind:
    """The kind of a file, by its name."""
    return KINDS.get(file_suffix(Path(path)), "text")


def file_suffix(path: Path) -> str:
    """Ending that names the format: ``.jsonl`` for ``a.jsonl`` and ``A.JSONL.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def names_files(name: str) -> bool:
    """Whether `name` stands for files rather than for a dataset or a folder of one."""
    if Path(name).is_dir():
        return False
    if Path(name).is_file() or not MAGIC.isdisjoint(name) or "," in name:
        return True
    return file_suffix(Path(name)) in (*KINDS, *TEXT_SUFFIXES, *BINARY)


def expand_files(patterns: str, argument: str = "train_file") -> list[str]:
    """Files of a comma-separated list of paths and globs, each glob in sorted order.

    A comma may be part of a path that exists. Folders and empty files that a glob finds are
    skipped, the latter with a `UserNotice`.

    Raises:
        UserError: a path is missing or not a file, a glob finds nothing, a file is empty or binary.
    """
    parts = [part.strip() for part in patterns.split(",")]
    files: list[str] = []
    while parts:
        found, count = _next_files(parts, argument)
        files += found
        del parts[:count]
    if not files:
        raise UserError(f"{argument}: names no file, got {patterns!r}")
    return files


def _next_files(parts: list[str], argument: str) -> tuple[list[str], int]:
    """Files that the first `count` of `parts` name, and `count`: more than one with commas."""
    for count in range(len(parts), 0, -1):
        pattern = ",".join(parts[:count])
        if pattern and Path(pattern).exists():
            _check_file(Path(pattern), argument)
            return [pattern], count
        if found := sorted(glob.glob(pattern, recursive=True)):
            return _readable(found, pattern, argument), count
    if parts[0]:
        raise UserError(f"{argument}: no file matches {parts[0]!r}; check the path")
    return [], 1


def _readable(found: list[str], pattern: str, argument: str) -> list[str]:
    """The files of a glob that hold something."""
    files = [file for file in found if Path(file).is_file()]
    empty = [file for file in files if Path(file).stat().st_size == 0]
    kept = [file for file in files if file not in set(empty)]
    if not kept:
        raise UserError(f"{argument}: {pattern!r} finds folders and empty files alone")
    if empty:
        warnings.warn(
            f"{argument}: skipped {len(empty)} empty files, the first is {empty[0]}",
            UserNotice,
            stacklevel=2,
        )
    for file in kept:
        _check_file(Path(file), argument)
    return kept


def _check_file(path: Path, argument: str) -> None:
    if not path.is_file():
        raise UserError(f"{argument}: {path} is not a file; a folder needs a glob such as {path}/*")
    if path.stat().st_size == 0:
        raise UserError(f"{argument}: {path} is empty; remove it from the list or fill it")
    suffix = file_suffix(path)
    if suffix in BINARY:
        what = (
            "compressed; unpack it, or use gzip or Zstandard" if suffix in COMPRESSED else "no text"
        )
        raise UserError(f"{argument}: {path} is {what} (text, .jsonl, .json and .parquet are read)")
    if suffix not in (*KINDS, *TEXT_SUFFIXES) and path.suffix.lower() not in PACKED:
        with path.open("rb") as handle:
            if b"\0" in handle.read(SNIFFED_BYTES):
                raise UserError(f"{argument}: {path} is no text: it holds zero bytes")


def file_stamp(files: list[str]) -> str:
    """Sizes and times of `files`, part of the cache key: changed files are read again."""
    stats = [Path(file).stat() for file in files]
    return ";".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def without_mark(text: str) -> str:
    """`text` without a byte-order mark at its beginning."""
    return text.removeprefix(BYTE_ORDER_MARK)
