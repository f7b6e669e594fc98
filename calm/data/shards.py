"""Shards of tokenized text: flat files that are written once and then memory-mapped.

| file | content |
| --- | --- |
| ``NAME.tokens`` | ids of all documents, one after the other, in the smallest unsigned type |
| ``NAME.documents`` | ``[D, 2]`` uint64: where each ends, in tokens and in chunks of K tokens |

All little-endian, without a header: any program maps them with one line, a slice is one read, and
the page cache of the system is shared by all processes. A chunk count includes a document's start
chunk, so that text with start chunks and text without are both read from the same files. What is in
them says the manifest (`calm.data.manifest`).

A shard is written under another name and renamed when it has reached the disk.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calm.integrity import new_digest

__all__ = ["ENDS", "TOKENS", "Layout", "ShardWriter", "TokenFile", "token_dtype"]

TOKENS, ENDS = ".tokens", ".documents"
PARTIAL = ".partial"
END_DTYPE = np.dtype("<u8")
MAPPED_FILES = 256  # at once in a process; each takes a file descriptor


class Layout(NamedTuple):
    """Documents with chunks of their own, see `calm.data.tokenization.align_document`."""

    start: int
    end: int
    patch_size: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id below `vocab_size`, little-endian."""
    return np.min_scalar_type(max(0, vocab_size - 1)).newbyteorder("<")


class ShardWriter:
    """Writes a shard document by document, without holding it.

    Args:
        folder: that it is written to.
        name: of its files, without their endings.
        dtype: from `token_dtype`.
        patch_size: K.

    Attributes:
        documents: written so far.
        tokens: likewise.
        chunks: likewise, each document with a start chunk.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], patch_size: int) -> None:
        self.dtype, self.patch_size = dtype, patch_size
        self.documents = self.tokens = self.chunks = 0
        self._paths = [folder / f"{name}{ending}" for ending in (TOKENS, ENDS)]
        self._files = [_partial(path).open("wb") for path in self._paths]
        self._digests = [new_digest(), new_digest()]

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Append documents; those without tokens leave no trace."""
        documents = [document for document in documents if len(document)]
        if not documents:
            return
        lengths = np.array([len(document) for document in documents], dtype=END_DTYPE)
        chunks = 1 + -(-lengths.astype(np.int64) // self.patch_size)
        ends = np.stack([self.tokens + np.cumsum(lengths), self.chunks + np.cumsum(chunks)], axis=1)
        self._write(np.concatenate(documents).astype(self.dtype), ends.astype(END_DTYPE))
        self.documents += len(documents)
        self.tokens, self.chunks = map(int, ends[-1])

    def _write(self, *arrays: np.ndarray) -> None:
        for file, digest, array in zip(self._files, self._digests, arrays, strict=True):
            content = array.tobytes()
            file.write(content)
            digest.update(content)

    def finish(self) -> dict[str, str]:
        """Give the files their names; the hash of each, by its ending."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(_partial(path), path)
        hashes = (digest.hexdigest() for digest in self._digests)
        return dict(zip((TOKENS, ENDS), hashes, strict=True))

    def discard(self) -> None:
        """Remove what has not been finished."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


@lru_cache(maxsize=MAPPED_FILES)
def _mapped(path: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))


class TokenFile(NamedTuple):
    """A finished shard, mapped when it is read.

    Attributes:
        path: of its files, without their endings.
        dtype: of its ids.
        documents: how many.
        tokens: how many.
        chunks: how many, with a start chunk for each document.
    """

    path: str
    dtype: str
    documents: int
    tokens: int
    chunks: int

    def length(self, layout: Layout | None) -> int:
        """Tokens in this layout."""
        return self.tokens if layout is None else self.chunks * layout.patch_size

    def read(self, start: int, stop: int, layout: Layout | None) -> np.ndarray:
        """Tokens [start, stop) in this layout, int64; ``~token`` is read without being predicted.

        With a layout they are what `align_document` gives for each document, one after the other.
        """
        tokens = _mapped(f"{self.path}{TOKENS}", self.dtype, (self.tokens,))
        if layout is None:
            return tokens[start:stop].astype(np.int64)
        ends = _mapped(f"{self.path}{ENDS}", END_DTYPE.str, (self.documents, 2))
        size = layout.patch_size
        document = bisect_right(ends[:, 1], start // size)
        parts = []
        while start < stop:
            first_token, first_chunk = map(int, ends[document - 1]) if document else (0, 0)
            last_token, last_chunk = map(int, ends[document])
            here = min(stop, last_chunk * size)
            places = np.arange(start, here) - (first_chunk + 1) * size  # 0: its first token
            parts.append(_aligned(tokens[first_token:last_token], places, layout))
            start, document = here, document + 1
        return np.concatenate(parts)


def _aligned(tokens: np.ndarray, places: np.ndarray, layout: Layout) -> np.ndarray:
    """`places` of a document: before 0 its start chunk, from its end on what fills its chunk."""
    is_token = (places >= 0) & (places < len(tokens))
    other = np.where(places < 0, ~layout.start, ~layout.end)
    return np.where(is_token, tokens[np.clip(places, 0, len(tokens) - 1)].astype(np.int64), other)
