"""What a folder of prepared text holds: ``prepared.json``, beside the hashes of ``manifest.json``.

Sources with their files, counts and a hash of their documents; the tokenizer by its hash; the type
of the ids, K, the share that is held out; and every shard with its counts and hashes. It is written
last: a folder with this file is complete.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from calm.data.shards import END_DTYPE, ENDS, TOKENS
from calm.errors import UserError
from calm.integrity import MANIFEST, check_files, write_atomically, write_manifest

__all__ = [
    "DESCRIPTION",
    "TRAIN",
    "UNFINISHED",
    "VALIDATION",
    "Description",
    "ShardRecord",
    "SourceRecord",
    "is_prepared",
    "read_description",
    "write_description",
]

DESCRIPTION = "prepared.json"
UNFINISHED = ".unfinished"  # folder of what a preparation remembers until it has finished
TRAIN, VALIDATION = "train", "validation"
FORMAT = 1


@dataclass(frozen=True)
class ShardRecord:
    """A shard.

    Attributes:
        name: of its files, without their endings.
        source: whose documents are in it.
        split: ``train`` or ``validation``.
        documents: how many.
        characters: of their text.
        tokens: how many.
        chunks: of K tokens, with a start chunk for each document.
        hashes: of its files, XXH3 of 128 bits, by their endings.
    """

    name: str
    source: str
    split: str
    documents: int
    characters: int
    tokens: int
    chunks: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class SourceRecord:
    """A text that was prepared.

    Attributes:
        name: of the source.
        weight: its share of an epoch, as a fraction; None where all of it is read.
        dataset: name of the dataset; None for files.
        files: names and sizes in bytes of the files.
        documents: how many, held out ones too.
        characters: of their text.
        tokens: how many.
        skipped: entries that could not be read.
        first_skipped: what was wrong with the first.
        hash: of the documents' text in order, XXH3 of 128 bits.
    """

    name: str
    weight: str | None
    dataset: str | None
    files: list[tuple[str, int]]
    documents: int
    characters: int
    tokens: int
    skipped: int
    first_skipped: str | None
    hash: str


@dataclass(frozen=True)
class Description:
    """A folder of prepared text.

    Attributes:
        tokenizer_hash: see `calm.data.tokenizer.tokenizer_hash`.
        vocab_size: V.
        dtype: of the ids in the shards.
        patch_size: K of the start chunks and of what fills last chunks.
        validation_split_percentage: share of documents that is held out.
        text_unit: one document of a text file.
        request: hash of what was asked for.
        sources: in the order in which they are read.
        shards: likewise.
        format: of this record.
    """

    tokenizer_hash: str
    vocab_size: int
    dtype: str
    patch_size: int
    validation_split_percentage: float
    text_unit: str
    request: str
    sources: list[SourceRecord] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    format: int = FORMAT

    @property
    def weights(self) -> dict[str, Fraction] | None:
        """Of each source, or None where nothing is weighted."""
        weights = {source.name: source.weight for source in self.sources}
        if None in weights.values():
            return None
        return {name: Fraction(str(weight)) for name, weight in weights.items()}

    @property
    def skipped(self) -> int:
        """Entries of all sources that could not be read."""
        return sum(source.skipped for source in self.sources)

    def of_split(self, split: str) -> list[ShardRecord]:
        """The shards of a split."""
        return [shard for shard in self.shards if shard.split == split]


def is_prepared(folder: str | Path | None) -> bool:
    """Whether this names a folder of prepared text, whole or not."""
    if folder is None or not Path(folder).is_dir():
        return False
    return any((Path(folder) / name).exists() for name in (DESCRIPTION, UNFINISHED))


def write_description(folder: Path, description: Description, others: Iterable[str] = ()) -> None:
    """Declare a folder complete: ``prepared.json``, then the manifest of all its files.

    Args:
        folder: with all its shards.
        description: of them.
        others: further files that belong to it.
    """
    content = json.dumps(asdict(description), indent=1, ensure_ascii=False)
    write_atomically(folder / DESCRIPTION, content + "\n")
    hashes = {
        f"{shard.name}{ending}": digest
        for shard in description.shards
        for ending, digest in shard.hashes.items()
    }
    listed = {DESCRIPTION, *hashes, *others}
    write_manifest(folder, listed.__contains__, hashes)


def read_description(folder: Path) -> Description:
    """The record of a folder, whose files have the sizes that it says.

    Their hashes are for `calm verify`: to read a large corpus takes long.

    Raises:
        UserError: no record, one that was changed, or shards that are missing or of another size.
    """
    path = folder / DESCRIPTION
    if (folder / UNFINISHED).exists() or not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: its preparation has not finished; run the same calm prepare")
    if not path.is_file():
        raise UserError(f"{folder} holds no prepared text: it has no {DESCRIPTION}")
    check_files(folder, only_small=True)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {content.get('format')!r}, this program reads {FORMAT}: "
                "prepare the text again"
            )
        shards = [ShardRecord(**shard) for shard in content.pop("shards")]
        if outside := next((s.name for s in shards if Path(s.name).name != s.name), None):
            raise UserError(f"{path}: the shard {outside!r} lies outside the folder")
        sources = [SourceRecord(**source) for source in content.pop("sources")]
        description = Description(**content, sources=sources, shards=shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}): prepare the text again") from error
    _check_sizes(folder, description)
    return description


def _check_sizes(folder: Path, description: Description) -> None:
    width = np.dtype(description.dtype).itemsize
    for shard in description.shards:
        sizes = {TOKENS: shard.tokens * width, ENDS: shard.documents * 2 * END_DTYPE.itemsize}
        for ending, expected in sizes.items():
            path = folder / f"{shard.name}{ending}"
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"holds {found:,} bytes"
                raise UserError(
                    f"{path} {what}, and {DESCRIPTION} says {expected:,} bytes: copy the folder "
                    "again, or prepare the text again"
                )
