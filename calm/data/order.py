"""The order in which training reads prepared text: known at any place, held nowhere.

`ShuffledBlocks` has an order for every epoch that is computed block by block, from the seed and the
block's place alone. Therefore any number of processes and loader workers read the same order, each
block once an epoch, and a run goes on at any place without reading what came before.
"""

import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch.utils.data import Dataset, Sampler

from calm.data.blocks import Block
from calm.data.prepared import PreparedBlocks

__all__ = ["EpochBatches", "ShuffledBlocks", "permuted"]

ROUNDS = 6


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
