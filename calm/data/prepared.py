"""Blocks of prepared text, by index: nothing is held, nothing is read before it is needed.

`PreparedBlocks` cuts the shards of a folder as `calm.data.packing` cuts a table: the same documents
in the same order give the same blocks. `ShuffledBlocks` is what training reads: an order for every
epoch that is computed block by block, from the seed and the block's place alone. Therefore any
number of processes and loader workers read the same order, each block once an epoch, and a run
goes on at any place without reading what came before.
"""

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset, Sampler

from calm.data.blocks import Block, make_block
from calm.data.manifest import Description, ShardRecord, read_description
from calm.data.mixture import epoch_shares
from calm.data.shards import Layout, TokenFile
from calm.errors import UserError
from calm.integrity import new_digest

__all__ = ["EpochBatches", "PreparedBlocks", "PreparedText", "ShuffledBlocks", "permuted"]

ROUNDS = 6


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
                f"one is {tokenizer_hash}): train with tokenizer_name {self.folder}, or prepare "
                "the text with the model's tokenizer"
            )
        if start_token_id is not None and made.patch_size != patch_size:
            raise UserError(
                f"{self.folder} was prepared for start chunks of K={made.patch_size} tokens, and "
                f"the model has K={patch_size}: pass calm prepare --patch-size {patch_size}"
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


class ShuffledBlocks(Dataset[Block]):
    """Blocks by their place in a run: in every epoch another order, known from the seed.

    Place p is in epoch e = p div N, where N is the length. Every sequence has a shuffled order of
    its own, in which each epoch goes on where the one before has stopped, and at the end begins
    again. A permutation of N places, another one every epoch, mixes what the epoch reads of all.

    Args:
        blocks: to read.
        seed: of the order.
    """

    def __init__(self, blocks: PreparedBlocks, seed: int) -> None:
        self.blocks, self.seed = blocks, seed
        self._ends = list(accumulate(blocks.shares))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> Block:
        return self.blocks.block(*self.source_of(place))

    def source_of(self, place: int) -> tuple[int, int]:
        """The sequence and the number of the block at a place of the run."""
        epoch, place = divmod(place, len(self))
        mixed = permuted(place, len(self), f"{self.seed} epoch {epoch}")
        sequence = next(number for number, end in enumerate(self._ends) if mixed < end)
        share, size = self.blocks.shares[sequence], self.blocks.sizes[sequence]
        drawn = epoch * share + mixed - self._ends[sequence] + share
        return sequence, permuted(drawn % size, size, f"{self.seed} sequence {sequence}")

    def batches(
        self, batch_size: int, processes: int = 1, process: int = 0, *, drop_last: bool = False
    ) -> "EpochBatches":
        """The places of one process, see `EpochBatches`."""
        return EpochBatches(len(self), batch_size, processes, process, drop_last=drop_last)

    @property
    def num_tokens(self) -> int:
        """As of the blocks."""
        return self.blocks.num_tokens

    @property
    def tokens_per_character(self) -> float:
        """As of the blocks."""
        return self.blocks.tokens_per_character

    def data_hash(self) -> str:
        """As of the blocks; the seed is recorded by itself."""
        return self.blocks.data_hash()


class EpochBatches(Sampler[Sequence[int]]):
    """Batches of places of `ShuffledBlocks` for one of several processes, which take turns.

    They are accelerate's: the last batches of several processes are filled up from the epoch's
    beginning, that of one process is short. A batch costs no more than its two ends, so that those
    before a resumed step are skipped at once.

    Args:
        length: places of an epoch.
        batch_size: of one process.
        processes: that share the epoch.
        process: which of them.
        drop_last: leave out what fills no batch of every process.
    """

    def __init__(
        self, length: int, batch_size: int, processes: int, process: int, *, drop_last: bool
    ) -> None:
        self.length, self.batch_size, self.drop_last = length, batch_size, drop_last
        self.processes, self.process = processes, process
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size * self.processes)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Sequence[int]]:
        base = self.epoch * self.length
        turn = self.batch_size * self.processes
        first = self.process * self.batch_size
        for start in range(first, first + len(self) * turn, turn):
            stop = start + self.batch_size
            if stop <= self.length:
                yield range(base + start, base + stop)
            elif self.processes == 1:
                yield range(base + start, base + self.length)
            else:
                yield [base + place % self.length for place in range(start, stop)]


def permuted(place: int, size: int, key: str) -> int:
    """Where a keyed permutation of 0 .. size - 1 takes `place`.

    A Feistel network on the least even number of bits that hold size - 1. A result beyond the range
    is permuted again, less than four times on average (cycle walking: Black and Rogaway, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    import xxhash  # here, so that training on other text needs none

    seed = xxhash.xxh3_64_intdigest(key.encode())
    while True:
        left, right = place >> half, place & mask
        for step in range(ROUNDS):
            word = struct.pack("<QQ", right, step)
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(word, seed) & mask)
        place = (left << half) | right
        if place < size:
            return place
