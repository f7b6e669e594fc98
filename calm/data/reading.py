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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow
import pyarrow.parquet

from calm.data.embedded import PREFIX, embedded_corpus
from calm.data.files import BYTE_ORDER_MARK, file_kind, without_mark
from calm.data.options import TextUnit

__all__ = ["TEXT_KEY", "Damage", "read_documents", "read_lines", "read_row_groups"]

TEXT_KEY = "text"
UTF8_MARK = BYTE_ORDER_MARK.encode()
PARQUET_ROWS = 64  # that are held at once
BLOCK = 1 << 20  # bytes read at a time where only lines are counted


@dataclass(frozen=True)
class Damage:
    """Something that cannot be read.

    Attributes:
        where: file, and entry or row.
        reason: what is wrong with it, and what was expected.
        line: of a file of lines, from 1.
    """

    where: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        where = self.where if self.line is None else f"{self.where}:{self.line}"
        return f"{where}: {self.reason}"


Line: TypeAlias = tuple[int, str | Damage]


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
        found: str | Damage = ""
        for found in _non_empty(_read_file(Path(source), keep_linebreaks, text_unit)):
            yield found
        if not found:
            yield Damage(source, "holds no document; remove it from the list or fill it")


def read_lines(
    path: str, start: int, stop: int, keep_linebreaks: bool = True
) -> Iterator[str | Damage]:
    """Every non-empty document of the lines that begin in bytes [start, stop) of a file.

    Args:
        path: a text file, of which one document is a line, or a ``.jsonl`` file; not compressed.
        start: first byte.
        stop: byte after the last one.
        keep_linebreaks: as for `read_documents`.
    """
    file, before = Path(path), None
    lines = _lines(file, start, stop)
    is_text = file_kind(file) == "text"
    found = _read_text(lines, keep_linebreaks, "line") if is_text else _read_json_lines(file, lines)
    for document in _non_empty(found):
        if isinstance(document, Damage) and document.line is not None:
            before = _count_lines(file, start) if before is None else before
            document = replace(document, line=document.line + before)
        yield document


def read_row_groups(path: str, first: int, last: int) -> Iterator[str | Damage]:
    """Every non-empty document of the row groups [first, last) of a Parquet file."""
    return _non_empty(_read_parquet(Path(path), first, last))


def _non_empty(documents: Iterable[str | Damage]) -> Iterator[str | Damage]:
    """`documents` without their byte-order marks, and without those that are empty."""
    for document in documents:
        if isinstance(document, str):
            document = without_mark(document)
        if document:
            yield document


def _count_lines(path: Path, stop: int) -> int:
    """Lines that begin before byte `stop`."""
    count, left = 0, max(0, stop - 1)  # a line break just before it begins no such line
    with path.open("rb") as handle:
        while left and (block := handle.read(min(left, BLOCK))):
            count += block.count(b"\n")
            left -= len(block)
    return count + (stop > 0)


def _read_file(path: Path, keep_linebreaks: bool, unit: TextUnit) -> Iterator[str | Damage]:
    match file_kind(path):
        case "parquet":
            yield from _read_parquet(path)
        case "json" if _is_array(path):
            yield from _read_array(path)
        case "json" | "jsonl":
            yield from _read_json_lines(path, _lines(path))
        case _:
            yield from _read_text(_lines(path), keep_linebreaks, unit)


def _lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """Line numbers from 1 and lines of a UTF-8 file, with their line breaks.

    Those that begin in bytes [start, stop) of a file that is not compressed; numbers then begin
    there.
    """
    number = 0
    try:
        with _open(path) as handle:
            if start:
                handle.seek(start - 1)
                handle.readline()  # the line that goes on here began before
            lines = handle if stop is None else _until(handle, stop)
            for number, raw in enumerate(lines, 1):
                yield number, _decode(raw.removeprefix(UTF8_MARK), path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"damaged gzip file: nothing can be read after line {number} ({error})"
        yield number, Damage(str(path), f"{reason}; copy or pack it again", number + 1)
    except OSError as error:  # pyarrow has no other for a damaged Zstandard file
        yield number, Damage(str(path), f"cannot be read ({error})", number + 1)


def _until(handle: BinaryIO, stop: int) -> Iterator[bytes]:
    """The lines of an open file that begin before byte `stop`."""
    place = handle.tell()
    while place < stop and (line := handle.readline()):
        yield line
        place += len(line)


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".zst":
            packed: Any = pyarrow.input_stream(str(path), compression="zstd")
            return io.BufferedReader(packed)
        case _:
            return path.open("rb")


def _decode(raw: bytes, path: Path, line: int) -> str | Damage:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Damage(
            str(path),
            f"not UTF-8 ({error.reason} at byte {error.start} of the line); convert the file, for "
            "example with iconv -t utf-8",
            line,
        )


def _read_text(
    lines: Iterable[Line], keep_linebreaks: bool, unit: TextUnit
) -> Iterator[str | Damage]:
    """Documents of a text file; a damaged line spoils its paragraph or file."""

    def join(lines: list[str]) -> str:
        if keep_linebreaks:
            return "".join(lines)
        return " ".join(stripped for line in lines if (stripped := line.strip()))

    pending: list[str] = []
    is_damaged = False
    for _, line in lines:
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


def _read_json_lines(path: Path, lines: Iterable[Line]) -> Iterator[str | Damage]:
    for number, line in lines:
        if isinstance(line, Damage):
            yield line
        elif line.strip():
            entry = _parse(line, str(path), number)
            yield entry if isinstance(entry, Damage) else _text_of(entry, str(path), number)


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


def _parse(text: str, where: str, number: int | None = None) -> Any:
    """What `text` says, or the `Damage`."""
    example = 'expected an object such as {"text": "..."}'
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f" of line {error.lineno}"
        reason = f"not JSON ({error.msg} at column {error.colno}{line})"
    except RecursionError:
        reason = "JSON that is nested too deeply"
    except ValueError as error:  # an integer of more digits than Python converts
        reason = f"JSON that cannot be read ({error})"
    return Damage(where, f"{reason}; {example}", number)


def _text_of(entry: object, where: str, number: int | None = None) -> str | Damage:
    """The text of an object, or the `Damage`."""
    if not isinstance(entry, dict):
        kind = type(entry).__name__
        return Damage(where, f'expected an object such as {{"text": "..."}}, got {kind}', number)
    if TEXT_KEY not in entry:
        keys = ", ".join(map(str, entry)) or "none"
        reason = f'no "{TEXT_KEY}" key (keys: {keys}); rename the key of the text'
        return Damage(where, reason, number)
    text = entry[TEXT_KEY]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return Damage(where, f'"{TEXT_KEY}" must be a string, got {kind}', number)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"half of a surrogate pair at character {error.start}"
            return Damage(where, reason, number)
    return text


def _read_parquet(path: Path, first: int = 0, last: int | None = None) -> Iterator[str | Damage]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.num_row_groups)[first:last]
            row = sum(file.metadata.row_group(group).num_rows for group in range(first))
            columns = file.schema_arrow.names
            if TEXT_KEY not in columns:
                found = ", ".join(columns) or "none"
                yield Damage(str(path), f'no "{TEXT_KEY}" column (columns: {found}); rename it')
                return
            batches = file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[TEXT_KEY])
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    yield _text_of({TEXT_KEY: text}, f"{path}: row {row}")
                    row += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield Damage(f"{path}: row {row}", f"damaged Parquet file ({error})")
