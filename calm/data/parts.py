"""A corpus cut into parts, each of which one process reads, tokenizes and writes as shards.

| text | a part is |
| --- | --- |
| lines of text and ``.jsonl``, not compressed | a span of bytes, or several small files |
| ``.parquet`` | a span of row groups |
| compressed files, ``.json``, paragraphs, whole files | a file, or several small ones |
| datasets, embedded corpora | a span of rows of the table in the cache of datasets |

The parts one after the other are the documents of the corpus in order. They depend on names and
sizes alone, so that a run that starts again finds the same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from calm.data.corpus import load_corpus
from calm.data.files import PACKED, expand_files, file_kind, file_stamp, names_files
from calm.data.manifest import TRAIN, VALIDATION
from calm.data.options import CorpusOptions, TextUnit
from calm.data.reading import TEXT_KEY, Damage, read_documents, read_lines, read_row_groups
from calm.errors import UserError

__all__ = ["Part", "Source", "open_source", "plan_parts", "read_part", "read_source", "shard_size"]

MIN_SHARD, MAX_SHARD = 1 << 20, 1 << 27  # bytes of text; a killed run loses one a process
SHARDS = 64  # that a corpus has at least, where they are larger than MIN_SHARD
UNPACKED = 3  # bytes of text in a byte of a compressed file, roughly
ROWS = 64  # of a table that are held at once


@dataclass(frozen=True)
class Source:
    """A text of a mixture.

    Attributes:
        name: of the source.
        text: what the flag names.
        files: that it names, in order; none for a dataset.
        tables: of a dataset, by split.
        skipped: rows of a dataset that could not be read.
        size: bytes of its files, or of its text.
    """

    name: str
    text: str
    files: tuple[str, ...] = ()
    tables: dict[str, datasets.Dataset] | None = None
    skipped: int = 0
    size: int = 0

    @property
    def stamp(self) -> list[str]:
        """What changes with its content."""
        if self.tables is not None:
            return [f"{split} {table._fingerprint}" for split, table in self.tables.items()]
        return [*self.files, file_stamp(list(self.files))]


@dataclass(frozen=True)
class Part:
    """What one process reads at a time.

    Attributes:
        source: name of its source.
        number: within the source.
        size: bytes, for the progress bar.
        files: whole files, or one of which `span` is read.
        span: of bytes, row groups or rows; None for whole files.
        split: of the table that it is a span of, or None.
    """

    source: str
    number: int
    size: int
    files: tuple[str, ...] = ()
    span: tuple[int, int] | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """The beginning of the names of its shards."""
        return f"{self.source}-{self.number:05d}"


def open_source(name: str, text: str, options: CorpusOptions) -> Source:
    """The files or tables of a text. A dataset is prepared in the cache of datasets.

    Args:
        name: of the source.
        text: files, a dataset or an embedded corpus.
        options: how to read it.

    Raises:
        UserError: see `load_corpus` and `expand_files`; a dataset without documents to train on.
    """
    if names_files(text):
        files = expand_files(text, "data")
        size = sum(_text_bytes(Path(file)) for file in files)
        return Source(name, text, tuple(files), size=size)
    chosen = replace(options, dataset_name=text, validation_split_percentage=0)
    corpus: Any = load_corpus(chosen)
    if corpus.train is None:
        raise UserError(f"--data {text} has no training split; pass files, or another dataset")
    tables = {TRAIN: corpus.train, VALIDATION: corpus.validation}
    tables = {split: table for split, table in tables.items() if table is not None}
    size = sum(int(table.data.nbytes) for table in tables.values())
    return Source(name, text, tables=tables, skipped=corpus.skipped, size=size)


def shard_size(sources: Sequence[Source]) -> int:
    """Bytes of text in a shard of these sources."""
    total = sum(source.size for source in sources)
    return min(MAX_SHARD, max(MIN_SHARD, total // SHARDS))


def plan_parts(source: Source, size: int, text_unit: TextUnit) -> list[Part]:
    """The parts of a source, of some `size` bytes each where it can be cut."""
    if source.tables is not None:
        spans = [
            (split, span, size_of_rows)
            for split, table in source.tables.items()
            for span, size_of_rows in _row_spans(table, size)
        ]
        return [
            Part(source.name, number, length, span=span, split=split)
            for number, (split, span, length) in enumerate(spans)
        ]
    pieces = _file_pieces(source.files, size, text_unit)
    return [
        Part(source.name, number, length, files, span)
        for number, (files, span, length) in enumerate(pieces)
    ]


def _text_bytes(path: Path) -> int:
    """Bytes of text in a file, by its size."""
    is_packed = path.suffix.lower() in PACKED or file_kind(path) == "parquet"
    return path.stat().st_size * (UNPACKED if is_packed else 1)


Piece = tuple[tuple[str, ...], tuple[int, int] | None, int]


def _file_pieces(files: Sequence[str], size: int, text_unit: TextUnit) -> Iterator[Piece]:
    """Spans of large files, and groups of small ones, in order."""
    group: list[str] = []
    held = 0
    for file in files:
        length = _text_bytes(Path(file))
        spans = list(_spans(Path(file), length, size, text_unit)) if length > size else []
        if group and (spans or held + length > size):
            yield tuple(group), None, held
            group, held = [], 0
        for span, span_length in spans:
            yield (file,), span, span_length
        if not spans:
            group.append(file)
            held += length
    if group:
        yield tuple(group), None, held


def _spans(
    path: Path, length: int, size: int, text_unit: TextUnit
) -> Iterator[tuple[tuple[int, int], int]]:
    """Spans of one file with their bytes; none for a file that can only be read whole."""
    kind = file_kind(path)
    if kind == "parquet":
        yield from _group_spans(path, length, size)
    elif path.suffix.lower() not in PACKED and (
        kind == "jsonl" or (kind == "text" and text_unit == "line")
    ):
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield (start, stop), stop - start


def _group_spans(path: Path, length: int, size: int) -> Iterator[tuple[tuple[int, int], int]]:
    try:
        groups = pyarrow.parquet.read_metadata(path).num_row_groups
    except (OSError, pyarrow.ArrowException):
        return  # reading it tells what is wrong
    step = max(1, groups * size // length)
    for first in range(0, groups, step):
        last = min(first + step, groups)
        yield (first, last), length * (last - first) // groups


def _row_spans(table: datasets.Dataset, size: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Spans of rows of some `size` bytes on average."""
    rows = len(table)
    mean = max(1, int(table.data.nbytes) // max(1, rows))
    step = max(1, size // mean)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield (first, last), (last - first) * mean


def read_part(
    part: Part,
    tables: dict[str, datasets.Dataset] | None,
    *,
    keep_linebreaks: bool,
    text_unit: TextUnit,
) -> Iterator[str | Damage]:
    """Every non-empty document of a part, and all that is damaged, in order.

    Args:
        part: from `plan_parts`.
        tables: of its source.
        keep_linebreaks: as for `read_documents`.
        text_unit: likewise.
    """
    if tables is not None and part.split is not None and part.span is not None:
        yield from _read_rows(tables[part.split], *part.span)
    elif part.span is None:
        yield from read_documents(part.files, keep_linebreaks, text_unit)
    elif file_kind(part.files[0]) == "parquet":
        yield from read_row_groups(part.files[0], *part.span)
    else:
        yield from read_lines(part.files[0], *part.span, keep_linebreaks)


def read_source(source: Source, text_unit: TextUnit) -> Iterator[str]:
    """Every non-empty document of a source to train on, without what is damaged."""
    if source.tables is not None:
        table = source.tables[TRAIN]
        return _read_rows(table, 0, len(table))
    entries = read_documents(source.files, text_unit=text_unit)
    return (entry for entry in entries if isinstance(entry, str))


def _read_rows(table: datasets.Dataset, first: int, last: int) -> Iterator[str]:
    for start in range(first, last, ROWS):
        yield from filter(None, table[start : min(start + ROWS, last)][TEXT_KEY])
