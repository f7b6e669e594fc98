"""From documents to blocks: concatenate them and cut every `block_size` tokens; nothing is dropped.

`calm.data.encoding` decides what separates documents, and `calm.data.tokenization` which tokens are
read without being predicted. The last block of a corpus is filled with pad tokens, whose labels are
-100.

`PackedBlocks` cuts a memory-mapped table without a copy. `PackedStream` packs documents as they
arrive. Both give the same blocks for the same documents.
"""

import hashlib
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from calm.data.blocks import Block, check_block_size, make_block
from calm.data.stream import PackedStream
from calm.data.tables import Documents
from calm.data.tokenization import (
    CHARACTERS,
    TOKENS,
    align_documents,
    tokenize_documents,
)
from calm.errors import UserError

__all__ = [
    "PackedBlocks",
    "pack_documents",
]


class PackedBlocks(Dataset[Block]):
    """Blocks of a tokenized table, by index. Tokens stay in the memory-mapped file.

    Args:
        documents: a table from `tokenize_documents` or `align_documents`.
        block_size: tokens in a block.
        pad_token_id: fills the last block.
        max_blocks: keep this many blocks, the first ones.

    Raises:
        UserError: the documents hold no token, or `max_blocks` leaves none.
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        block_size: int,
        pad_token_id: int,
        max_blocks: int | None = None,
    ) -> None:
        chunks = documents.data.column(TOKENS).chunks
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self.block_size = block_size
        self.pad_token_id = pad_token_id
        available = int(self._ends[-1]) if len(self._ends) else 0
        limit = available if max_blocks is None else max_blocks * block_size
        self.num_tokens = min(available, limit)
        if self.num_tokens <= 0:
            raise UserError(
                f"no data left after packing: {len(documents)} documents hold {available} tokens"
                + ("" if max_blocks is None else f" and max_samples is {max_blocks}")
            )
        self.tokens_per_character = available / max(1, int(np.sum(documents[CHARACTERS])))

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.block_size
        tokens = self._slice(start, min(start + self.block_size, self.num_tokens))
        return make_block(tokens, self.block_size, self.pad_token_id)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        parts = []
        chunk = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[chunk]) - len(self._chunks[chunk])
            part = self._chunks[chunk][start - first : stop - first]
            parts.append(part)
            start += len(part)
            chunk += 1
        return np.concatenate(parts)

    def data_hash(self) -> str:
        """Hash of the token ids. It does not depend on the file layout or the block size."""
        digest = hashlib.blake2b(digest_size=16)
        left = self.num_tokens
        for chunk in self._chunks:
            digest.update(chunk[:left].astype("<i4").tobytes())
            left -= min(left, len(chunk))
        return digest.hexdigest()


def pack_documents(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    patch_size: int,
    max_blocks: int | None = None,
    start_token_id: int | None = None,
    repeat: bool = False,
    lanes: int = 1,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> PackedBlocks | PackedStream:
    """Documents to blocks: `PackedBlocks` of a table, `PackedStream` of a stream.

    Args:
        documents: texts.
        tokenizer: turns them into tokens.
        block_size: tokens in a block, a multiple of `patch_size`.
        patch_size: K, tokens in a chunk.
        max_blocks: keep this many blocks, the first ones.
        start_token_id: token of the chunk before each document, see `align_documents`. None
            concatenates documents without such chunks.
        repeat: start a stream again at its end.
        lanes: of a stream, see `calm.data.stream`.
        num_proc: processes that prepare a table.
        overwrite_cache: prepare a table again.

    Raises:
        UserError: `block_size` is no multiple of `patch_size`, or no data is left.
    """
    check_block_size(block_size, patch_size)
    end_token_id = tokenizer.eos_token_id
    if isinstance(documents, datasets.IterableDataset):
        layout = {"start": start_token_id, "end": end_token_id, "patch_size": patch_size}
        return PackedStream(
            documents,
            tokenizer,
            block_size,
            layout=None if start_token_id is None else layout,
            max_blocks=max_blocks,
            repeat=repeat,
            lanes=lanes,
        )
    preparation: Any = {"num_proc": num_proc, "overwrite_cache": overwrite_cache}
    tokenized = tokenize_documents(documents, tokenizer, **preparation)
    if start_token_id is not None:
        tokenized = align_documents(
            tokenized,
            start_token_id=start_token_id,
            end_token_id=end_token_id,
            patch_size=patch_size,
            **preparation,
        )
    return PackedBlocks(tokenized, block_size, tokenizer.pad_token_id, max_blocks)
