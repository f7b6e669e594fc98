"""Documents from text and JSON files. Every error names the file and the line.

| file | one document is |
| --- | --- |
| ``.txt`` | a line (``text_unit="line"``, as in the published scripts), a paragraph or the file |
| ``.jsonl`` | the ``text`` of one JSON object a line |
| ``.json`` | the ``text`` of each object of a JSON array, or lines as ``.jsonl`` |

Each may be compressed with gzip (``.jsonl.gz``). Text is UTF-8.
"""

import glob
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from calm.errors import UserError

__all__ = ["TextUnit", "expand_files", "file_stamp", "read_documents"]

TextUnit = Literal["line", "paragraph", "file"]

SUFFIXES = (".txt", ".jsonl", ".json")
TEXT_KEY = "text"


def expand_files(patterns: str, argument: str = "train_file") -> list[str]:
    """Files of a comma-separated list of paths and globs, each glob in sorted order.

    Raises:
        UserError: a path is missing or not a file, a glob matches nothing, a file is empty or of an
            unknown kind.
    """
    files: list[str] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        if Path(pattern).exists():
            files.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"{argument}: no file matches {pattern!r}; check the path")
        files += matches
    if not files:
        raise UserError(f"{argument}: names no file, got {patterns!r}")
    for file in files:
        _check_file(Path(file), argument)
    return files


def _check_file(path: Path, argument: str) -> None:
    if not path.is_file():
        raise UserError(f"{argument}: {path} is not a file; a folder needs a glob such as {path}/*")
    if _suffix(path) not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{argument}: {path} has an unknown ending; expected {known}, or one + .gz")
    if path.stat().st_size == 0:
        raise UserError(f"{argument}: {path} is empty; remove it from the list or fill it")


def _suffix(path: Path) -> str:
    """Ending that names the format: ``.jsonl`` for ``a.jsonl`` and ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def file_stamp(files: list[str]) -> str:
    """Sizes and times of `files`, part of the cache key: changed files are read again."""
    stats = [Path(file).stat() for file in files]
    return ";".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def read_documents(
    files: list[str], keep_linebreaks: bool = True, text_unit: TextUnit = "line", stamp: str = ""
) -> Iterator[dict[str, str]]:
    """``{"text": ...}`` of every non-empty document of `files`, in order.

    Args:
        files: paths from `expand_files`.
        keep_linebreaks: text files keep their line breaks; otherwise lines are joined by a space.
        text_unit: what one document of a text file is.
        stamp: not read here; callers that cache make it part of their key.

    Raises:
        UserError: naming file and line, for bytes that are not UTF-8, lines that are not JSON,
            objects without text.
    """
    for file in files:
        path = Path(file)
        read = _read_text if _suffix(path) == ".txt" else _read_json
        found = False
        for text in filter(None, read(path, keep_linebreaks, text_unit)):
            found = True
            yield {TEXT_KEY: text}
        if not found:
            raise UserError(f"{path}: holds no document; remove it from the list or fill it")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines of a UTF-8 file, with their line breaks."""
    with _open(path) as handle:
        number = 0
        try:
            for number, raw in enumerate(handle, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line); "
                "convert the file, for example with iconv -t utf-8"
            ) from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged gzip file after line {number} ({error})") from error


def _read_text(path: Path, keep_linebreaks: bool, unit: TextUnit) -> Iterator[str]:
    def join(lines: list[str]) -> str:
        if keep_linebreaks:
            return "".join(lines)
        return " ".join(stripped for line in lines if (stripped := line.strip()))

    pending: list[str] = []
    for _, line in _lines(path):
        if unit == "line":
            yield join([line])
        elif unit == "paragraph" and not line.strip():
            if pending:
                yield join(pending)
                pending = []
        else:
            pending.append(line)
    if pending:
        yield join(pending)


def _read_json(path: Path, keep_linebreaks: bool, unit: TextUnit) -> Iterator[str]:
    """Texts of a JSON file, to which `keep_linebreaks` and `unit` do not apply."""
    is_array = False
    for number, line in _lines(path):
        if not line.strip():
            continue
        if _suffix(path) == ".json" and line.lstrip().startswith("["):
            is_array = True
            break
        yield _text_of(_parse(line, path, number), f"{path}:{number}")
    if is_array:
        whole = _parse("".join(line for _, line in _lines(path)), path, 0)
        for index, entry in enumerate(whole):
            yield _text_of(entry, f"{path}: entry {index}")


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line or error.lineno
        raise UserError(
            f"{path}:{line}: not JSON ({error.msg} at column {error.colno}); "
            'every line must be an object such as {"text": "..."}'
        ) from error


def _text_of(entry: object, where: str) -> str:
    if not isinstance(entry, dict):
        raise UserError(
            f'{where}: expected an object such as {{"text": "..."}}, got {type(entry).__name__}'
        )
    if TEXT_KEY not in entry:
        keys = ", ".join(map(str, entry)) or "none"
        raise UserError(f'{where}: no "{TEXT_KEY}" key (keys: {keys}); rename the key of the text')
    text = entry[TEXT_KEY]
    if not isinstance(text, str):
        raise UserError(f'{where}: "{TEXT_KEY}" must be a string, got {type(text).__name__}')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: half of a surrogate pair at character {error.start}"
            ) from error
    return text
