"""Documents as datasets, read in pieces that are bounded in bytes, not only in documents.

A dataset has the columns ``text`` and ``damage``. Each row has one of the two: a document, or the
message about what could not be read in its place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from calm.data.options import TextUnit
from calm.data.reading import TEXT_KEY, Damage, read_documents

__all__ = ["DAMAGE_KEY", "FEATURES", "Documents", "document_table", "rows_in_bounds"]

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset

DAMAGE_KEY = "damage"
FEATURES = datasets.Features(
    {TEXT_KEY: datasets.Value("large_string"), DAMAGE_KEY: datasets.Value("large_string")}
)
MAX_ROWS = 1000  # held at once, at most
MAX_BYTES = 1 << 23  # held at once, if no document is longer
TOKEN_BYTES = 4


@dataclass
class ReaderConfig(datasets.BuilderConfig):
    """What to read, see `read_documents`; the cache is named by all of it.

    Attributes:
        sources: files or names of embedded corpora. datasets splits a list among processes.
        keep_linebreaks: as for `read_documents`.
        text_unit: likewise.
        stamp: changes with the content of the sources.
    """

    sources: list[str] = field(default_factory=list)
    keep_linebreaks: bool = True
    text_unit: TextUnit = "line"
    stamp: str = ""


class Reader(datasets.ArrowBasedBuilder):
    """The documents of a `ReaderConfig`."""

    BUILDER_CONFIG_CLASS = ReaderConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        config = self.config
        arguments = {
            "sources": config.sources,
            "keep_linebreaks": config.keep_linebreaks,
            "text_unit": config.text_unit,
        }
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs=arguments)]

    def _generate_tables(self, **arguments: Any) -> Iterator[tuple[int, pyarrow.Table]]:
        yield from enumerate(_tables(read_documents(**arguments)))


def _tables(documents: Iterator[str | Damage]) -> Iterator[pyarrow.Table]:
    """Tables of `MAX_ROWS` documents or of `MAX_BYTES`, whichever is less, but of two at least.

    datasets collects tables of one row until it has a thousand of them.
    """
    rows: list[tuple[str, str | None]] = []
    size = 0
    for document in documents:
        row = ("", str(document)) if isinstance(document, Damage) else (document, None)
        rows.append(row)
        size += len(row[0])
        if len(rows) == MAX_ROWS or (size > MAX_BYTES and len(rows) > 1):
            yield _table(rows)
            rows, size = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[tuple[str, str | None]]) -> pyarrow.Table:
    texts, damage = zip(*rows, strict=True)
    return pyarrow.table({TEXT_KEY: texts, DAMAGE_KEY: damage}, schema=FEATURES.arrow_schema)


def document_table(
    config: dict[str, Any], *, cache_dir: str | None, streaming: bool, num_proc: int | None
) -> Documents:
    """The documents of a `ReaderConfig`: prepared in `cache_dir`, or a stream.

    Args:
        config: fields of the `ReaderConfig`.
        cache_dir: where the prepared table is kept; by default in the cache of datasets.
        streaming: read nothing now.
        num_proc: processes that read.
    """
    reader = Reader(cache_dir=cache_dir, **config)
    if streaming:
        return reader.as_streaming_dataset(split=datasets.Split.TRAIN)
    workers = min(num_proc or 1, len(config["sources"]))
    reader.download_and_prepare(num_proc=workers if workers > 1 else None)
    return reader.as_dataset(split=datasets.Split.TRAIN)


def rows_in_bounds(table: datasets.Dataset, column: str) -> int:
    """How many rows of `table` to hold at once, so that `column` takes some `MAX_BYTES` of memory.

    The result is the largest size of which no batch holds more than `MAX_BYTES`, or twice the
    longest row. Only lengths are read. They take 8 bytes a row.
    """
    chunks = [_row_bytes(chunk) for chunk in table.data.column(column).chunks]
    sizes = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)
    if table._indices is not None:
        sizes = sizes[table._indices.column(0).to_numpy()]
    if not len(sizes):
        return MAX_ROWS
    bound = max(MAX_BYTES, 2 * int(sizes.max()))
    rows = MAX_ROWS
    while rows > 1 and np.add.reduceat(sizes, np.arange(0, len(sizes), rows)).max() > bound:
        rows //= 2
    return rows


def _row_bytes(column: pyarrow.Array) -> np.ndarray:
    """Bytes of each entry of a column of strings or of lists of token ids."""
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        lengths = pyarrow.compute.multiply(pyarrow.compute.list_value_length(column), TOKEN_BYTES)
    else:
        lengths = pyarrow.compute.binary_length(column)
    return pyarrow.compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)
