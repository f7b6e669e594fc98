"""One part of a corpus becomes shards: read, deal to splits, tokenize, write, remember how far.

What is finished is a JSON file a part, moved into place in one step after the shards that it lists.
A part that can only be read from its beginning, such as a compressed file, has several shards; a
run that starts again reads on after the last of them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.data.corpus import is_held_out
from calm.data.encoding import Encoder
from calm.data.manifest import TRAIN, UNFINISHED, VALIDATION, ShardRecord
from calm.data.options import OnError, TextUnit
from calm.data.parts import Part, read_part
from calm.data.reading import Damage
from calm.data.shards import ShardWriter
from calm.data.tables import MAX_BYTES, MAX_ROWS
from calm.integrity import new_digest, write_atomically

__all__ = ["Job", "PartState", "PartWriter", "read_state"]


@dataclass(frozen=True)
class Job:
    """What all processes of a preparation know.

    Attributes:
        folder: that is written to.
        tokenizer: turns text into tokens.
        dtype: of the ids in the shards.
        patch_size: K.
        percentage: of documents that are held out.
        shard_size: bytes of text in a shard.
        text_unit: one document of a text file.
        on_error: whether damage stops the preparation.
        tables: of each source that is a dataset.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    dtype: np.dtype[Any]
    patch_size: int
    percentage: float
    shard_size: int
    text_unit: TextUnit
    on_error: OnError
    tables: dict[str, dict[str, datasets.Dataset]]


@dataclass
class PartState:
    """How far a part is.

    Attributes:
        entries: documents and damaged entries that are done.
        is_finished: whether these are all.
        shards: written.
        hashes: of the text of each group of shards.
        skipped: entries that could not be read.
        first_skipped: what was wrong with the first.
        is_refused: whether the part ended at damage, which is then counted, not written.
    """

    entries: int = 0
    is_finished: bool = False
    shards: list[ShardRecord] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    skipped: int = 0
    first_skipped: str | None = None
    is_refused: bool = False


def _state_file(folder: Path, part: Part) -> Path:
    return folder / UNFINISHED / f"{part.name}.json"


def read_state(folder: Path, part: Part) -> PartState:
    """How far a part is; not begun if there is no record."""
    path = _state_file(folder, part)
    if not path.is_file():
        return PartState()
    content = json.loads(path.read_text(encoding="utf-8"))
    return PartState(**{**content, "shards": [ShardRecord(**shard) for shard in content["shards"]]})


class PartWriter:
    """Writes parts, one after the other.

    Args:
        job: the preparation.
        tick: is told how many bytes of text have been tokenized.
        is_stopped: whether to leave a part as it is.
    """

    def __init__(
        self, job: Job, tick: Callable[[int], None], is_stopped: Callable[[], bool]
    ) -> None:
        self.job, self.tick, self.is_stopped = job, tick, is_stopped
        self.encoder = Encoder(job.tokenizer)

    def write(self, part: Part) -> PartState:
        """Write what is left of a part; its state, which says whether damage ended it."""
        job, state = self.job, read_state(self.job.folder, part)
        read = read_part(
            part, job.tables.get(part.source), keep_linebreaks=True, text_unit=job.text_unit
        )
        entries = islice(read, state.entries, None)
        while not (state.is_finished or state.is_refused or self.is_stopped()):
            group = _Group(self, part, len(state.hashes))
            try:
                group.fill(entries, state)
                if not (state.is_refused or self.is_stopped()):
                    group.finish(state)
                    path = _state_file(job.folder, part)
                    write_atomically(path, json.dumps(asdict(state), ensure_ascii=False))
            finally:
                group.discard()
        return state


class _Group:
    """The shards of a part that are written at a time: one a split."""

    def __init__(self, owner: PartWriter, part: Part, number: int) -> None:
        self.owner, self.part = owner, part
        self.name = f"{part.name}-{number:03d}"
        self._writers: dict[str, ShardWriter] = {}
        self._characters = {TRAIN: 0, VALIDATION: 0}
        self._text = new_digest()
        self._size = 0

    def fill(self, entries: Iterator[str | Damage], state: PartState) -> None:
        """Read until the shards are full or the part ends."""
        job = self.owner.job
        while self._size < job.shard_size and not self.owner.is_stopped():
            batch, is_last = _next_batch(entries, min(MAX_BYTES, job.shard_size - self._size))
            state.entries += len(batch)
            for damage in (entry for entry in batch if isinstance(entry, Damage)):
                state.skipped += 1
                state.first_skipped = state.first_skipped or str(damage)
            if state.skipped and job.on_error == "stop":
                state.skipped += sum(isinstance(entry, Damage) for entry in entries)
                state.is_refused = True
                return
            self._add([entry for entry in batch if isinstance(entry, str)])
            if is_last:
                state.is_finished = True
                return

    def _add(self, texts: list[str]) -> None:
        dealt: dict[str, list[str]] = {}
        size = 0
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            size += len(content)
            self._text.update(content + b"\0")
            dealt.setdefault(self._split(text), []).append(text)
        job = self.owner.job
        for split, chosen in dealt.items():
            if split not in self._writers:
                name = f"{split}-{self.name}"
                self._writers[split] = ShardWriter(job.folder, name, job.dtype, job.patch_size)
            self._writers[split].add(self.owner.encoder.documents(chosen))
            self._characters[split] += sum(map(len, chosen))
        self._size += size
        self.owner.tick(size)

    def _split(self, text: str) -> str:
        """Which side a document is on. A dataset with a validation split has said so itself."""
        part, job = self.part, self.owner.job
        if part.split is not None and VALIDATION in job.tables[part.source]:
            return part.split
        is_other = job.percentage > 0 and is_held_out(text, job.percentage)
        return VALIDATION if is_other else TRAIN

    def finish(self, state: PartState) -> None:
        """Give the shards their names, and list them."""
        for split, writer in self._writers.items():
            hashes = writer.finish()
            record = ShardRecord(
                f"{split}-{self.name}", self.part.source, split, writer.documents,
                self._characters[split], writer.tokens, writer.chunks, hashes,
            )  # fmt: skip
            state.shards.append(record)
        state.hashes.append(self._text.hexdigest())

    def discard(self) -> None:
        """Remove what has not been finished."""
        for writer in self._writers.values():
            writer.discard()


def _next_batch(entries: Iterator[str | Damage], max_size: int) -> tuple[list[str | Damage], bool]:
    """Entries to tokenize together, bounded in number and size, and whether they are the last."""
    batch: list[str | Damage] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += len(entry) if isinstance(entry, str) else 0
        if len(batch) == MAX_ROWS or size >= max_size:
            return batch, False
    return batch, True
