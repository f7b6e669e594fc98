"""Documents as token ids, ready to be packed.

`tokenize_documents` encodes documents by the rule of `calm.data.encoding`: each ends with an end
token. `align_documents` then gives each document chunks of its own:

    <begin> x K | document, end token, filled up to a whole chunk

A table is prepared once and cached. A stream is tokenized as it is read. Either way the documents
that are held at once are bounded in bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from calm.data.corpus import code_stamp
from calm.data.encoding import Encoder
from calm.data.reading import TEXT_KEY
from calm.data.tables import MAX_BYTES, MAX_ROWS, rows_in_bounds
from calm.data.tokenizer import tokenizer_hash

__all__ = [
    "CHARACTERS",
    "TOKENS",
    "align_document",
    "align_documents",
    "tokenize_documents",
    "tokenize_stream",
]

TOKENS, CHARACTERS = "input_ids", "num_characters"
Columns = dict[str, Any]


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.Dataset:
    """Token ids of every document of a table (``input_ids``) and its ``num_characters``.

    The cache key is made of documents and tokenizer.
    """
    return _map(
        documents,
        partial(_encode, tokenizer=tokenizer),
        [TEXT_KEY],
        key=tokenizer_hash(tokenizer),
        title="tokenizing",
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
    )


def align_documents(
    tokenized: datasets.Dataset,
    *,
    start_token_id: int,
    end_token_id: int,
    patch_size: int,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.Dataset:
    """`align_document` for every document of a table.

    Args:
        tokenized: from `tokenize_documents`.
        start_token_id: token of the start chunk.
        end_token_id: fills the last chunk.
        patch_size: K.
        num_proc: processes.
        overwrite_cache: align again what is aligned.
    """
    return _map(
        tokenized.with_format("numpy"),
        partial(_align, start=start_token_id, end=end_token_id, patch_size=patch_size),
        [TOKENS, CHARACTERS],
        key=f"aligned {start_token_id} {end_token_id} {patch_size}",
        title="aligning",
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
    ).with_format(None)


def tokenize_stream(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    """Token ids of one document of a stream after the other; some are read ahead."""
    encoder = Encoder(tokenizer)
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size > MAX_BYTES or len(texts) == MAX_ROWS:
            yield from encoder.documents(texts)
            texts, size = [], 0
    yield from encoder.documents(texts)


def align_document(tokens: np.ndarray, *, start: int, end: int, patch_size: int) -> np.ndarray:
    """A tokenized document with a chunk of start tokens before it, filled up to whole chunks.

    The start chunk and the end tokens that fill the last chunk are read but never predicted. Such a
    token is stored as its complement ``~token``, a negative number. An empty document stays empty.
    """
    if not len(tokens):
        return tokens
    before = np.full(patch_size, ~start, dtype=tokens.dtype)
    fill = np.full(-len(tokens) % patch_size, ~end, dtype=tokens.dtype)
    return np.concatenate([before, tokens, fill])


def _map(
    table: datasets.Dataset,
    function: Callable[..., Columns],
    columns: list[str],
    *,
    key: str,
    title: str,
    num_proc: int | None,
    overwrite_cache: bool,
) -> datasets.Dataset:
    """Apply `function` to batches of `columns`; it gives tokens and characters. `key` names the
    cache.
    """
    key = f"{table._fingerprint} {key} {code_stamp()}"
    return table.map(
        function,
        batched=True,
        batch_size=rows_in_bounds(table, columns[0]),
        input_columns=columns,
        remove_columns=columns,
        features=datasets.Features(
            {TOKENS: datasets.List(datasets.Value("int32")), CHARACTERS: datasets.Value("int64")}
        ),
        num_proc=num_proc,
        load_from_cache_file=not overwrite_cache,
        new_fingerprint=hashlib.blake2b(key.encode(), digest_size=8).hexdigest(),
        desc=title,
    )


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Columns:
    return {
        TOKENS: Encoder(tokenizer).documents(texts),
        CHARACTERS: [len(text) for text in texts],
    }


def _align(documents: Sequence[np.ndarray], characters: Sequence[int], **layout: int) -> Columns:
    aligned = [align_document(np.asarray(tokens, np.int32), **layout) for tokens in documents]
    return {TOKENS: aligned, CHARACTERS: characters}
