"""Documents of files: the one reader of text, whatever the command and the number of processes.

| file | one document is |
| --- | --- |
| text | a line (``text_unit="line"``, as in the published scripts), a paragraph or the file |
| ``.jsonl`` | the ``text`` of one JSON object a line |
| ``.json`` | the ``text`` of each object of a JSON array, or lines as ``.jsonl`` |
| ``.parquet`` | the column ``text`` of one row |

Text is UTF-8. Byte-order marks are dropped. What cannot be read is no exception but a `Damage`, an
entry of its own: it crosses processes and caches like any document, and `calm.data.corpus` decides
whether it stops the run.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from calm.data.embedded import PREFIX, embedded_corpus
from calm.data.files import BYTE_ORDER_MARK, file_kind, without_mark
from calm.data.options import TextUnit

__all__ = ["TEXT_KEY", "Damage", "read_documents"]

TEXT_KEY = "text"
UTF8_MARK = BYTE_ORDER_MARK.encode()
PARQUET_ROWS = 64  # that are held at once


@dataclass(frozen=True)
class Damage:
    """Something that cannot be read.

    Attributes:
        where: file, and line or entry.
        reason: what is wrong with it, and what was expected.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_documents(
    sources: Iterable[str], keep_linebreaks: bool = True, text_unit: TextUnit = "line"
) -> Iterator[str | Damage]:
    """Every non-empty document of `sources`, and all that is damaged, in order.

    Args:
        sources: paths from `calm.data.files.expand_files`, or names of embedded corpora.
        keep_linebreaks: text files keep their line breaks; otherwise lines are joined by a space.
        text_unit: what one document of a text file is.
    """
    for source in sources:
        if source.startswith(PREFIX):
            yield from embedded_corpus(source)
            continue
        found = False
        for document in _read_file(Path(source), keep_linebreaks, text_unit):
            if isinstance(document, str):
                document = without_mark(document)
            if document:
                found = True
                yield document
        if not found:
            yield Damage(source, "holds no document; remove it from the list or fill it")


def _read_file(path: Path, keep_linebreaks: bool, unit: TextUnit) -> Iterator[str | Damage]:
    match file_kind(path):
        case "parquet":
            yield from _read_parquet(path)
        case "json" if _is_array(path):
            yield from _read_array(path)
        case "json" | "jsonl":
            yield from _read_json_lines(path)
        case _:
            yield from _read_text(path, keep_linebreaks, unit)


def _lines(path: Path) -> Iterator[tuple[int, str | Damage]]:
    """Line numbers from 1 and lines of a UTF-8 file, with their line breaks."""
    number = 0
    try:
        with _open(path) as handle:
            for number, raw in enumerate(handle, 1):
                yield number, _decode(raw.removeprefix(UTF8_MARK), f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"damaged gzip file: nothing can be read after line {number} ({error})"
        yield number, Damage(f"{path}:{number + 1}", f"{reason}; copy or pack it again")
    except OSError as error:  # pyarrow has no other for a damaged Zstandard file
        yield number, Damage(f"{path}:{number + 1}", f"cannot be read ({error})")


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            packed: Any = pyarrow.input_stream(str(path), compression="zstd")
            return io.BufferedReader(packed)
        case _:
            return path.open("rb")


def _decode(raw: bytes, where: str) -> str | Damage:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Damage(
            where,
            f"not UTF-8 ({error.reason} at byte {error.start} of the line); convert the file, for "
            "example with iconv -t utf-8",
        )


def _read_text(path: Path, keep_linebreaks: bool, unit: TextUnit) -> Iterator[str | Damage]:
    """Documents of a text file; a damaged line spoils its paragraph or file."""

    def join(lines: list[str]) -> str:
        if keep_linebreaks:
            return "".join(lines)
        return " ".join(stripped for line in lines if (stripped := line.strip()))

    pending: list[str] = []
    is_damaged = False
    for _, line in _lines(path):
        if isinstance(line, Damage):
            yield line
            is_damaged = unit != "line"
        elif unit == "line":
            yield join([line])
        elif unit == "paragraph" and not line.strip():
            if pending and not is_damaged:
                yield join(pending)
            pending, is_damaged = [], False
        elif not is_damaged:
            pending.append(line)
    if pending and not is_damaged:
        yield join(pending)


def _read_json_lines(path: Path) -> Iterator[str | Damage]:
    for number, line in _lines(path):
        if isinstance(line, Damage):
            yield line
        elif line.strip():
            where = f"{path}:{number}"
            entry = _parse(line, where)
            yield entry if isinstance(entry, Damage) else _text_of(entry, where)


def _is_array(path: Path) -> bool:
    """Whether a JSON file is one array; damage shows when it is read."""
    for _, line in _lines(path):
        if isinstance(line, Damage):
            return False
        if line.strip():
            return line.lstrip().startswith("[")
    return False


def _read_array(path: Path) -> Iterator[str | Damage]:
    lines = [line for _, line in _lines(path)]
    damaged = next((line for line in lines if isinstance(line, Damage)), None)
    whole = damaged or _parse("".join(map(str, lines)), str(path))
    if isinstance(whole, Damage):
        yield whole
    else:
        for index, entry in enumerate(whole):
            yield _text_of(entry, f"{path}: entry {index}")


def _parse(text: str, where: str) -> Any:
    """What `text` says, or the `Damage`."""
    example = 'expected an object such as {"text": "..."}'
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f" of line {error.lineno}"
        return Damage(where, f"not JSON ({error.msg} at column {error.colno}{line}); {example}")
    except RecursionError:
        return Damage(where, f"JSON that is nested too deeply; {example}")
    except ValueError as error:  # an integer of more digits than Python converts
        return Damage(where, f"JSON that cannot be read ({error}); {example}")


def _text_of(entry: object, where: str) -> str | Damage:
    if not isinstance(entry, dict):
        return Damage(
            where, f'expected an object such as {{"text": "..."}}, got {type(entry).__name__}'
        )
    if TEXT_KEY not in entry:
        keys = ", ".join(map(str, entry)) or "none"
        return Damage(where, f'no "{TEXT_KEY}" key (keys: {keys}); rename the key of the text')
    text = entry[TEXT_KEY]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Damage(where, f'"{TEXT_KEY}" must be a string, got {kind}')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Damage(where, f"half of a surrogate pair at character {error.start}")
    return text


def _read_parquet(path: Path) -> Iterator[str | Damage]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if TEXT_KEY not in columns:
                found = ", ".join(columns) or "none"
                yield Damage(str(path), f'no "{TEXT_KEY}" column (columns: {found}); rename it')
                return
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[TEXT_KEY]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({TEXT_KEY: text}, f"{path}: row {row}")
                    row += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Damage(f"{path}: row {row}", f"damaged Parquet file ({error})")
