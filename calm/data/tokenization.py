"""Documents as token ids, ready to be packed.

`tokenize_documents` separates documents as the tokenizer does. Llama's, for example, begins every
text with its begin token, as in the published runs. Where a tokenizer adds nothing, its end token
follows every document. `align_documents` then gives each document chunks of its own:

    <begin> x K | document, end token, filled up to a whole chunk
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from calm.data.corpus import Documents, code_stamp
from calm.data.files import TEXT_KEY
from calm.data.tokenizer import tokenizer_hash

__all__ = ["CHARACTERS", "TOKENS", "align_documents", "document_separator", "tokenize_documents"]

TOKENS, CHARACTERS = "input_ids", "num_characters"


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The end token if `tokenizer` adds neither begin nor end token by itself, else None."""
    ids = tokenizer("a")["input_ids"]
    adds_its_own = ids[0] == tokenizer.bos_token_id or ids[-1] == tokenizer.eos_token_id
    return None if adds_its_own else tokenizer.eos_token_id


def tokenize_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> Documents:
    """Token ids of every document with its separator (``input_ids``) and its ``num_characters``.

    A cached corpus is tokenized once. The cache key is made of documents, tokenizer and separator.
    """
    separator = document_separator(tokenizer)
    return _map_tokens(
        documents,
        partial(_encode, tokenizer=tokenizer, separator=separator),
        TEXT_KEY,
        key=f"{tokenizer_hash(tokenizer)} {separator}",
        title="tokenizing",
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
    )


def align_documents(
    tokenized: Documents,
    *,
    start_token_id: int,
    end_token_id: int,
    patch_size: int,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> Documents:
    """Tokenized documents with a chunk of start tokens before each, and filled up to whole chunks.

    The start chunk and the end tokens that fill the last chunk are read but never predicted. Such a
    token is stored as its complement ``~token``, a negative number.

    Args:
        tokenized: from `tokenize_documents`.
        start_token_id: token of the start chunk.
        end_token_id: ends every document; one that ends with it already gets no second one.
        patch_size: K.
        num_proc: processes.
        overwrite_cache: align again what is aligned.
    """
    return _map_tokens(
        tokenized,
        partial(_align, start=start_token_id, end=end_token_id, patch_size=patch_size),
        [TOKENS, CHARACTERS],
        key=f"aligned {start_token_id} {end_token_id} {patch_size}",
        title="aligning",
        num_proc=num_proc,
        overwrite_cache=overwrite_cache,
    )


def _map_tokens(
    documents: Documents,
    function: Callable[..., dict[str, list[Any]]],
    columns: str | list[str],
    *,
    key: str,
    title: str,
    num_proc: int | None,
    overwrite_cache: bool,
) -> Documents:
    """Apply `function` to batches of `columns`; it gives tokens and characters. `key` names the
    cache of a table.
    """
    features = datasets.Features(
        {TOKENS: datasets.List(datasets.Value("int32")), CHARACTERS: datasets.Value("int64")}
    )
    common: dict[str, Any] = {
        "batched": True,
        "input_columns": columns,
        "remove_columns": columns,
        "features": features,
    }
    if isinstance(documents, datasets.IterableDataset):
        return documents.map(function, **common)
    key = f"{documents._fingerprint} {key} {code_stamp()}"
    return documents.map(
        function,
        num_proc=num_proc,
        load_from_cache_file=not overwrite_cache,
        new_fingerprint=hashlib.blake2b(key.encode(), digest_size=8).hexdigest(),
        desc=title,
        **common,
    )


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, separator: int | None
) -> dict[str, list[Any]]:
    # split_special_tokens: a document that spells out a special token is text like any other.
    encoded = tokenizer(
        list(texts),
        verbose=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    end = [] if separator is None else [separator]
    return {
        TOKENS: [
            ids + end if text else [] for ids, text in zip(encoded["input_ids"], texts, strict=True)
        ],
        CHARACTERS: [len(text) for text in texts],
    }


def _align(
    documents: Sequence[list[int]],
    characters: Sequence[int],
    *,
    start: int,
    end: int,
    patch_size: int,
) -> dict[str, list[Any]]:
    aligned = []
    for tokens in documents:
        ended = tokens if not tokens or tokens[-1] == end else [*tokens, end]
        fill = [~end] * (-len(ended) % patch_size)
        aligned.append([~start] * patch_size + ended + fill if tokens else [])
    return {TOKENS: aligned, CHARACTERS: list(characters)}
