"""Blocks of prepared text, by index: nothing is held, nothing is read before it is needed.

`PreparedBlocks` cuts the shards of a folder as `calm.data.packing` cuts a table: the same documents
in the same order give the same blocks. The order in which training reads them is that of
`calm.data.order`.
"""

from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from calm.data.blocks import Block, check_block_size, make_block
from calm.data.manifest import VALIDATION, Description, ShardRecord, read_description
from calm.data.mixture import epoch_shares
from calm.data.shards import Layout, TokenFile
from calm.data.tokenizer import tokenizer_hash
from calm.errors import UserError
from calm.integrity import new_digest

__all__ = ["PreparedBlocks", "PreparedText"]


class PreparedText:
    """A folder that `calm prepare` wrote.

    Args:
        folder: its path.

    Attributes:
        description: what it holds.

    Raises:
        UserError: see `read_description`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description: Description = read_description(self.folder)

    def check(self, tokenizer_hash: str, start_token_id: int | None, patch_size: int) -> None:
        """Refuse a model that reads other tokens or, with start chunks, chunks of another K."""
        made = self.description
        if made.tokenizer_hash != tokenizer_hash:
            raise UserError(
                f"{self.folder} was prepared with another tokenizer ({made.tokenizer_hash}, this "
                f"one is {tokenizer_hash}): prepare the text with the model's tokenizer, or train "
                f"with tokenizer_name {self.folder}"
            )
        if start_token_id is not None and made.patch_size != patch_size:
            raise UserError(
                f"{self.folder} was prepared for start chunks of K={made.patch_size} tokens, and "
                f"the model has K={patch_size}: pass calm prepare --patch-size {patch_size}"
            )

    def check_held_out(self, percentage: float) -> None:
        """Refuse another share of held-out documents than the text was prepared with."""
        made = self.description.validation_split_percentage
        if percentage != made:
            raise UserError(
                f"validation_split_percentage: {self.folder} was prepared with {made:g} % held "
                f"out, got {percentage:g}; pass {made:g}, prepare it again, or name another text "
                "to evaluate on"
            )

    def blocks_for(
        self,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        *,
        block_size: int,
        patch_size: int,
        start_token_id: int | None,
        max_blocks: int | None = None,
    ) -> "PreparedBlocks":
        """The blocks of a split as a model reads them.

        Args:
            tokenizer: of the model.
            split: ``train`` or ``validation``.
            block_size: tokens in a block, a multiple of `patch_size`.
            patch_size: K, tokens in a chunk.
            start_token_id: token of the chunk before each document; None without such chunks.
            max_blocks: keep this many, at most.

        Raises:
            UserError: the text was prepared for another tokenizer or K, or holds nothing out; see
                `PreparedBlocks`.
        """
        check_block_size(block_size, patch_size)
        self.check(tokenizer_hash(tokenizer), start_token_id, patch_size)
        if split == VALIDATION and not self.description.of_split(VALIDATION):
            raise UserError(
                f"{self.folder} holds no held-out document: prepare the text with a "
                "validation_split_percentage above 0, or evaluate on another text"
            )
        start, end = start_token_id, tokenizer.eos_token_id
        return self.blocks(
            split,
            block_size=block_size,
            pad_token_id=tokenizer.pad_token_id,
            layout=None if start is None else Layout(start, end, patch_size),
            max_blocks=max_blocks,
        )

    def blocks(
        self,
        split: str,
        *,
        block_size: int,
        pad_token_id: int,
        layout: Layout | None,
        max_blocks: int | None = None,
    ) -> "PreparedBlocks":
        """The blocks of a split, ``train`` or ``validation``; see `PreparedBlocks`."""
        shards = self.description.of_split(split)
        weights = self.description.weights if split == "train" else None
        groups = [shards]
        if weights is not None:
            groups = [[shard for shard in shards if shard.source == name] for name in weights]
        return PreparedBlocks(
            [ShardSequence(self.folder, group, self.description, layout) for group in groups],
            block_size,
            pad_token_id,
            weights=None if weights is None else list(weights.items()),
            max_blocks=max_blocks,
        )


class ShardSequence:
    """The tokens of shards, one after the other.

    Args:
        folder: that they are in.
        shards: their records, in order.
        description: of the folder.
        layout: with start chunks; None without.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[ShardRecord],
        description: Description,
        layout: Layout | None,
    ) -> None:
        self.shards, self.layout = shards, layout
        self._files = [
            TokenFile(
                str(folder / shard.name), description.dtype, shard.documents, shard.tokens,
                shard.chunks,
            )
            for shard in shards
        ]  # fmt: skip
        self._ends = np.cumsum([file.length(layout) for file in self._files], dtype=np.int64)
        self._vocab_size = description.vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int64; a negative one is read without being predicted."""
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[shard - 1]) if shard else 0
            here = min(stop, int(self._ends[shard]))
            part = self._files[shard].read(start - first, here - first, self.layout)
            if part.max() >= self._vocab_size:
                raise UserError(
                    f"{self._files[shard].path} holds a token {part.max()}, and the vocabulary has "
                    f"{self._vocab_size} entries: the file is damaged, see calm verify"
                )
            parts.append(part)
            start, shard = here, shard + 1
        return np.concatenate(parts)

    def hash(self) -> str:
        """Of tokens and documents, from the hashes that were taken when they were written."""
        digest = new_digest()
        for shard in self.shards:
            digest.update(repr(sorted(shard.hashes.items())).encode())
        return str(digest.hexdigest())


class PreparedBlocks(Dataset[Block]):
    """Blocks of sequences of shards, in the order of the text.

    Args:
        sequences: each packed by itself; its last block is padded.
        block_size: tokens in a block.
        pad_token_id: fills last blocks.
        weights: names and shares of the sequences in an epoch; None to read all of them.
        max_blocks: blocks of an epoch, at most; without weights the first ones.

    Attributes:
        sizes: blocks of each sequence that may be read.
        shares: blocks of each that an epoch reads.

    Raises:
        UserError: there is no block, or a sequence is too short for its weight.
    """

    def __init__(
        self,
        sequences: list[ShardSequence],
        block_size: int,
        pad_token_id: int,
        *,
        weights: list[tuple[str, Fraction]] | None = None,
        max_blocks: int | None = None,
    ) -> None:
        self.block_size, self.pad_token_id = block_size, pad_token_id
        self._sequences, self._max_blocks = sequences, max_blocks
        self._weights = weights
        sizes = [-(-len(sequence) // block_size) for sequence in sequences]
        shares = epoch_shares(
            sizes, None if weights is None else [weight for _, weight in weights], max_blocks
        )
        self.shares = shares
        self.sizes = shares if weights is None else sizes
        for named, share in zip(weights or [], shares, strict=False):
            if not share:
                raise UserError(
                    f"source {named[0]}: an epoch of the mixture holds no block of it: add text of "
                    "the other sources, or give it a larger weight"
                )
        if not sum(shares):
            raise UserError("no data left after packing: the prepared text holds no token")
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        sequence = next(number for number, end in enumerate(self._ends) if index < end)
        return self.block(sequence, index - self._ends[sequence] + self.sizes[sequence])

    def block(self, sequence: int, number: int) -> Block:
        """A block of a sequence, by its number in it."""
        tokens = self._sequences[sequence]
        start = number * self.block_size
        found = tokens.slice(start, min(start + self.block_size, len(tokens)))
        return make_block(found, self.block_size, self.pad_token_id)

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks that may be read."""
        return sum(
            min(len(sequence), size * self.block_size)
            for sequence, size in zip(self._sequences, self.sizes, strict=True)
        )

    @property
    def tokens_per_character(self) -> float:
        """Of all of the text."""
        characters = sum(s.characters for sequence in self._sequences for s in sequence.shards)
        return sum(map(len, self._sequences)) / max(1, characters)

    def data_hash(self) -> str:
        """Hash of tokens, weights and how many are read, from those of the shards."""
        weights = [(name, str(weight)) for name, weight in self._weights or []]
        hashes = [sequence.hash() for sequence in self._sequences]
        limit = None if self.sizes == self._all_sizes() else self.num_tokens
        read = self.shares if weights else limit  # shares decide the order of a run
        content = repr((weights, hashes, read))
        return str(new_digest(content.encode()).hexdigest())

    def _all_sizes(self) -> list[int]:
        return [-(-len(sequence) // self.block_size) for sequence in self._sequences]
