"""Documents of the corpus that the flags name: datasets with one column, ``text``.

A corpus is named by files (``train_file``), by a hub dataset or a local dataset folder
(``dataset_name``), or as an embedded one (``dataset_name=embedded:docstrings``). A cached corpus is
a memory-mapped table in the cache of datasets. With ``streaming`` the text is read during training,
and no more than a buffer is kept.

A corpus without validation data is split by document. A document is held out if a hash of its text
is below the wanted share. The choice depends on the text alone. Therefore a streamed corpus, a
cached one and one read by several workers hold out the same documents, the autoencoder and the
language model hold out the same ones, and equal documents are always on the same side.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import datasets
import pyarrow.compute
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError

from calm.data.embedded import PREFIX, check_embedded, embedded_stamp
from calm.data.files import DATA_SUFFIXES, expand_files, file_stamp, file_suffix
from calm.data.manifest import is_prepared
from calm.data.options import CorpusOptions, OnError
from calm.data.reading import TEXT_KEY
from calm.data.tables import DAMAGE_KEY, FEATURES, Documents, document_table, rows_in_bounds
from calm.errors import UserError, message_of, one_line

__all__ = [
    "Corpus",
    "code_stamp",
    "damage_advice",
    "is_held_out",
    "load_corpus",
]

logger = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out; None where there are none.

    Attributes:
        train: a dataset with the column ``text``.
        validation: likewise.
        skipped: documents that could not be read and were skipped; None for a stream, which counts
            them in the log.
    """

    train: Documents | None
    validation: Documents | None
    skipped: int | None = 0


def load_corpus(options: CorpusOptions) -> Corpus:
    """Training and validation documents.

    Raises:
        UserError: nothing or two things named, missing or damaged files, no text column, an empty
            side of the split.
    """
    if options.dataset_name and (options.train_file or options.validation_file):
        raise UserError("dataset_name and train_file/validation_file exclude each other; pass one")
    percentage = options.validation_split_percentage
    if not 0 <= percentage < 100:
        raise UserError(f"validation_split_percentage must lie in [0, 100), got {percentage}")
    if options.on_error not in get_args(OnError):
        raise UserError(f"on_error must be stop or skip, got {options.on_error!r}")
    try:
        named, skipped = _named_splits(options), 0
        splits = {}
        for split, documents in named.items():
            splits[split], count = _sound(documents, options.on_error)
            skipped += count
        if VALIDATION not in splits and percentage > 0:
            splits = _split_by_document(splits[TRAIN], percentage)
    except DatasetGenerationError as error:
        raise UserError(
            f"the text cannot be prepared: {one_line(error) or message_of(error)}"
        ) from error
    return Corpus(splits.get(TRAIN), splits.get(VALIDATION), None if options.streaming else skipped)


def _named_splits(options: CorpusOptions) -> dict[str, Documents]:
    """Documents by split, with what is damaged in them."""
    name = options.dataset_name
    if name and name.startswith(PREFIX):
        check_embedded(name)  # an unknown one is an error here, not in another process
        return {TRAIN: _read(options, [name], embedded_stamp(name))}
    if name:
        return _hub_splits(options, name)
    splits = {}
    for split, argument in ((TRAIN, "train_file"), (VALIDATION, "validation_file")):
        if patterns := getattr(options, argument):
            files = expand_files(patterns, argument)
            splits[split] = _read(options, files, file_stamp(files))
    if not splits:
        raise UserError(
            "no text to learn from; pass train_file (text, jsonl, json or parquet files), or "
            f"dataset_name (a hub dataset, a folder, or {PREFIX}docstrings)"
        )
    return splits


@cache
def code_stamp() -> str:
    """Hash of this package's code, part of every cache key: new code never reads an old cache."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(source.read_bytes() for source in sources)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _read(options: CorpusOptions, sources: list[str], stamp: str) -> Documents:
    fresh = f" {time.time_ns()}" if options.overwrite_cache else ""
    config = {
        "sources": sources,
        "keep_linebreaks": options.keep_linebreaks,
        "text_unit": options.text_unit,
        "stamp": f"{stamp} {code_stamp()}{fresh}",
    }
    return document_table(
        config,
        cache_dir=options.cache_dir,
        streaming=options.streaming,
        num_proc=options.preprocessing_num_workers,
    )


# What cannot be read


def _sound(documents: Documents, on_error: OnError) -> tuple[Documents, int]:
    """Documents without the damaged ones, and how many those were (0 for a stream).

    Raises:
        UserError: some are damaged, and `on_error` is ``stop``. A stream raises it when it gets
            there.
    """
    if isinstance(documents, datasets.IterableDataset):
        kept = documents.filter(_StreamCheck(on_error))
        return kept.select_columns([TEXT_KEY]), 0
    if DAMAGE_KEY not in documents.column_names:
        return documents, 0
    damage = documents.data.column(DAMAGE_KEY)
    count = len(damage) - damage.null_count
    if count:
        first = pyarrow.compute.drop_null(damage)[0].as_py()
        if on_error == "stop":
            raise UserError(damage_advice(first, count - 1))
        logger.warning("skipped %d of %d documents, the first: %s", count, len(damage), first)
        batch = rows_in_bounds(documents, TEXT_KEY)
        documents = documents.filter(_is_none, input_columns=DAMAGE_KEY, batch_size=batch)
        if not len(documents):
            raise UserError(f"all {count} documents are damaged, the first: {first}")
    return documents.select_columns([TEXT_KEY]), count


def _is_none(damage: str | None) -> bool:
    return damage is None


def damage_advice(first: str, more: int) -> str:
    """The error about what cannot be read: the first, and how many more."""
    also = f" (and {more} more)" if more else ""
    return f"{first}{also}; mend the text, or skip what is damaged (on_error=skip)"


class _StreamCheck:
    """Whether a row of a stream is a document; counts what is not, in this process."""

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.count = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        damage = row[DAMAGE_KEY]
        if damage is None:
            return True
        if self.on_error == "stop":
            raise UserError(damage_advice(damage, 0))
        self.count += 1
        if self.count & (self.count - 1) == 0:  # 1, 2, 4, 8, ...
            logger.warning("skipped %d documents so far, now: %s", self.count, damage)
        return False


# Datasets of other people


def _hub_splits(options: CorpusOptions, name: str) -> dict[str, Documents]:
    """Splits of a hub dataset, a folder of data files, or a folder of ``save_to_disk``."""
    if Path(name).is_file():
        raise UserError(f"dataset_name: {name} is a file; pass it as train_file")
    if is_prepared(name):
        raise UserError(f"dataset_name: {name} is a prepared text; pass it as train_file")
    if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
        loaded = datasets.load_from_disk(name)
    elif files := _files_of_splits(options, name):
        loaded = {split: _read(options, found, file_stamp(found)) for split, found in files.items()}
    else:
        loaded = _load_hub_dataset(options, name)
    if isinstance(loaded, datasets.Dataset):
        loaded = {TRAIN: loaded}
    if TRAIN in loaded:
        chosen = {key: loaded[key] for key in (TRAIN, VALIDATION) if key in loaded}
    else:
        held_out = next((key for key in (VALIDATION, TEST) if key in loaded), None)
        if held_out is None:
            splits = ", ".join(loaded)
            raise UserError(
                f"dataset_name: {name} has no split {TRAIN!r}, {VALIDATION!r} or {TEST!r} (splits: "
                f"{splits})"
            )
        chosen = {VALIDATION: loaded[held_out]}
    return {key: _text_only(documents, f"{name} ({key})") for key, documents in chosen.items()}


def _files_of_splits(options: CorpusOptions, name: str) -> dict[str, list[str]]:
    """Files of each split of a folder that `calm.data.reading` reads; of another, none.

    Which file belongs to which split is datasets' rule: by the names of files and folders. A
    ``README.md`` may say otherwise, and other kinds of files have readers in datasets alone.
    """
    folder = Path(name)
    if not folder.is_dir() or options.dataset_config_name or (folder / "README.md").exists():
        return {}
    try:
        patterns = get_data_patterns(name)
    except (OSError, EmptyDatasetError):
        return {}
    files = DataFilesDict.from_patterns(patterns, base_path=name)
    suffixes = {file_suffix(Path(file)) for found in files.values() for file in found}
    if not suffixes.issubset(DATA_SUFFIXES):
        return {}
    return {str(split): sorted(found) for split, found in files.items()}


def _load_hub_dataset(options: CorpusOptions, name: str) -> Any:
    mode = datasets.DownloadMode
    try:
        return datasets.load_dataset(
            name,
            options.dataset_config_name,
            cache_dir=options.cache_dir,
            streaming=options.streaming,
            token=options.token,
            revision=options.revision,
            download_mode=mode.FORCE_REDOWNLOAD if options.overwrite_cache else None,
        )
    except (OSError, ValueError, DatasetGenerationError) as error:
        if Path(name).is_dir():
            raise UserError(
                f"dataset_name: no text that can be read in the folder {name} "
                f"({message_of(error)}); expected .txt, .jsonl, .json or .parquet files, or name "
                f"files, as in '{name}/*'"
            ) from error
        raise UserError(
            f"dataset_name: cannot load {name!r} ({message_of(error)}); a folder of your own "
            "needs an existing path, a hub dataset its exact name and a connection"
        ) from error


def _text_only(documents: Documents, name: str) -> Documents:
    """The text of a dataset and, as for files, what is damaged in it."""
    columns = documents.column_names
    if columns and DAMAGE_KEY in columns:  # our own reader has checked it
        return documents
    if columns is None:  # a stream of unknown columns: take those of its first row
        columns = list(next(iter(documents), {}))
    if TEXT_KEY not in columns:
        found = ", ".join(columns) or "none"
        raise UserError(
            f'dataset_name: {name} has no "{TEXT_KEY}" column (columns: {found}); '
            "rename the column of the text"
        )
    documents = documents.select_columns([TEXT_KEY])
    check: dict[str, Any] = {"function": partial(_check_row, name=name), "with_indices": True}
    if isinstance(documents, datasets.Dataset):
        kind = documents.features[TEXT_KEY].dtype
        if kind not in ("string", "large_string"):
            raise UserError(f'dataset_name: "{TEXT_KEY}" of {name} must hold strings, got {kind}')
        if not documents.data.column(TEXT_KEY).null_count:
            return documents  # the usual case: no copy
        check |= {"batch_size": rows_in_bounds(documents, TEXT_KEY), "features": FEATURES}
    return documents.map(**check)


def _check_row(row: Mapping[str, Any], index: int, name: str) -> dict[str, str | None]:
    text = row[TEXT_KEY]
    if isinstance(text, str):
        return {TEXT_KEY: text, DAMAGE_KEY: None}
    kind = "null" if text is None else type(text).__name__
    return {TEXT_KEY: "", DAMAGE_KEY: f"{name}, row {index}: the text must be a string, got {kind}"}


# Held-out documents


def is_held_out(text: str, percentage: float) -> bool:
    """Whether the document `text` belongs to the `percentage` held out for validation."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percentage / 100 * 2**64


def _is_kept(text: str, percentage: float) -> bool:
    return not is_held_out(text, percentage)


def _split_by_document(documents: Documents, percentage: float) -> dict[str, Documents]:
    splits = {}
    is_table = isinstance(documents, datasets.Dataset)
    bounds = {"batch_size": rows_in_bounds(documents, TEXT_KEY)} if is_table else {}
    for split, belongs in ((TRAIN, _is_kept), (VALIDATION, is_held_out)):
        chosen = documents.filter(
            partial(belongs, percentage=percentage), input_columns=TEXT_KEY, **bounds
        )
        if isinstance(chosen, datasets.Dataset) and len(chosen) == 0:
            raise UserError(
                f"{len(documents)} documents leave no {split} document if {percentage:g} % are "
                "held out; cut the text into more documents (text_unit), add text, or hold out "
                "another share"
            )
        splits[split] = chosen
    return splits
