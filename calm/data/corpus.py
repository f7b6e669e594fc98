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
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetGenerationError

from calm.data.embedded import PREFIX, embedded_corpus
from calm.data.files import TEXT_KEY, TextUnit, expand_files, file_stamp, read_documents
from calm.errors import UserError

__all__ = ["Corpus", "CorpusOptions", "Documents", "code_stamp", "is_held_out", "load_corpus"]

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """What to read. Names and meanings are those of the training flags."""

    train_file: str | None = None
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    streaming: bool = False
    validation_split_percentage: float = 5
    keep_linebreaks: bool = True
    text_unit: TextUnit = "line"
    cache_dir: str | None = None
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    token: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out; None where there are none."""

    train: Documents | None
    validation: Documents | None


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
    try:
        splits = _named_splits(options)
        if VALIDATION not in splits and percentage > 0:
            splits = _split_by_document(splits[TRAIN], percentage)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, UserError) else error from None
    return Corpus(splits.get(TRAIN), splits.get(VALIDATION))


def _named_splits(options: CorpusOptions) -> dict[str, Documents]:
    name = options.dataset_name
    if name and name.startswith(PREFIX):
        stamp = f"{platform.python_version()} {code_stamp()}"
        return {TRAIN: _from_generator(options, _embedded, {"name": name, "stamp": stamp})}
    if name:
        return _hub_splits(options, name)
    splits = {}
    for split, argument in ((TRAIN, "train_file"), (VALIDATION, "validation_file")):
        if patterns := getattr(options, argument):
            splits[split] = _from_files(options, expand_files(patterns, argument))
    if not splits:
        raise UserError(
            "no text to learn from; pass train_file (text, jsonl or json files), or dataset_name "
            f"(a hub dataset, a folder, or {PREFIX}docstrings)"
        )
    return splits


@cache
def code_stamp() -> str:
    """Hash of this package's code, part of every cache key: new code never reads an old cache."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(source.read_bytes() for source in sources)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _from_files(options: CorpusOptions, files: list[str]) -> Documents:
    arguments = {
        "files": files,  # a list: datasets splits it among processes and loader workers
        "keep_linebreaks": options.keep_linebreaks,
        "text_unit": options.text_unit,
        "stamp": f"{file_stamp(files)} {code_stamp()}",
    }
    return _from_generator(options, read_documents, arguments, num_shards=len(files))


def _embedded(name: str, stamp: str) -> Iterator[dict[str, str]]:
    for text in embedded_corpus(name):
        yield {TEXT_KEY: text}


def _from_generator(
    options: CorpusOptions, generator: Any, arguments: dict[str, Any], num_shards: int = 1
) -> Documents:
    features = datasets.Features({TEXT_KEY: datasets.Value("large_string")})
    if options.streaming:
        return datasets.IterableDataset.from_generator(
            generator, features=features, gen_kwargs=arguments
        )
    if options.overwrite_cache:
        arguments = {**arguments, "stamp": f"{arguments['stamp']} {time.time_ns()}"}
    workers = min(options.preprocessing_num_workers or 1, num_shards)
    return datasets.Dataset.from_generator(
        generator,
        features=features,
        cache_dir=options.cache_dir,
        gen_kwargs=arguments,
        num_proc=workers if workers > 1 else None,
    )


def _hub_splits(options: CorpusOptions, name: str) -> dict[str, Documents]:
    """Splits of a hub dataset, a folder of data files, or a folder of ``save_to_disk``."""
    if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
        loaded = datasets.load_from_disk(name)
    else:
        loaded = _load_hub_dataset(options, name)
    if isinstance(loaded, datasets.Dataset):
        loaded = {TRAIN: loaded}
    elif TRAIN not in loaded:
        splits = ", ".join(loaded)
        raise UserError(f"dataset_name: {name} has no {TRAIN!r} split (splits: {splits})")
    return {key: _text_only(loaded[key], name) for key in (TRAIN, VALIDATION) if key in loaded}


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
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset_name: cannot load {name!r} ({error}); a folder of your own needs an existing "
            "path, a hub dataset its exact name and a connection"
        ) from error


def _text_only(documents: Documents, name: str) -> Documents:
    columns = documents.column_names
    if columns is None:  # a stream of unknown columns: take those of its first row
        columns = list(next(iter(documents), {}))
    if TEXT_KEY not in columns:
        found = ", ".join(columns) or "none"
        raise UserError(
            f'dataset_name: {name} has no "{TEXT_KEY}" column (columns: {found}); '
            "rename the column of the text"
        )
    return documents.select_columns([TEXT_KEY])


def is_held_out(text: str, percentage: float) -> bool:
    """Whether the document `text` belongs to the `percentage` held out for validation."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percentage / 100 * 2**64


def _is_kept(text: str, percentage: float) -> bool:
    return not is_held_out(text, percentage)


def _split_by_document(documents: Documents, percentage: float) -> dict[str, Documents]:
    splits = {}
    for split, belongs in ((TRAIN, _is_kept), (VALIDATION, is_held_out)):
        chosen = documents.filter(partial(belongs, percentage=percentage), input_columns=TEXT_KEY)
        if isinstance(chosen, datasets.Dataset) and len(chosen) == 0:
            raise UserError(
                f"{len(documents)} documents leave no {split} document at "
                f"validation_split_percentage={percentage}; pass validation_file, another "
                "percentage, or cut the text into more documents (text_unit)"
            )
        splits[split] = chosen
    return splits
