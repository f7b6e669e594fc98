"""Blocks of a stream of documents, in one order however many processes and workers read it.

Documents are dealt to V lanes, each to the lane with the least text so far. Every lane packs its
own blocks, and block n of the stream is the next of lane n mod V. So a reader that needs certain
blocks tokenizes the lanes that they are in, and of the others knows enough by reading their text.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import datasets
import fsspec.asyn
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from calm.data.blocks import Block, pack
from calm.data.reading import TEXT_KEY
from calm.data.tokenization import align_document, tokenize_stream
from calm.errors import UserError

__all__ = ["PackedStream"]


class PackedStream(IterableDataset[Block | None]):
    """Blocks of a stream of documents, in order.

    Args:
        documents: a stream of texts.
        tokenizer: turns them into tokens.
        block_size: tokens in a block.
        layout: start token, end token and K as `align_document` takes them, or None.
        max_blocks: keep this many blocks of each pass, the first ones.
        repeat: start again at the end.
        lanes: V; several need `repeat`.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        layout: dict[str, int] | None,
        max_blocks: int | None,
        repeat: bool,
        lanes: int = 1,
    ) -> None:
        super().__init__()
        if lanes > 1 and max_blocks is not None:
            raise UserError(f"stream_lanes={lanes} has no first blocks: pass stream_lanes=1")
        if lanes > 1 and not repeat:
            raise ValueError("lanes end at different blocks: several need repeat=True")
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.layout = layout
        self.max_blocks = max_blocks
        self.repeat = repeat
        self.lanes = lanes
        self.deal()

    def deal(self, batch_size: int = 1, processes: int = 1, process: int = 0) -> None:
        """Say who takes which blocks, before iteration.

        Batches go to the processes in turn, and those of a process to its loader workers in turn,
        as torch's loader takes them. In the place of a block of another process stands None:
        accelerate picks every process's own.
        """
        self.batch_size, self.processes, self.process = batch_size, processes, process

    def __iter__(self) -> Iterator[Block | None]:
        worker = get_worker_info()
        workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if worker is not None:
            fsspec.asyn.reset_lock()  # a fork may have copied it while it was held
        together = self.batch_size * self.processes
        own = range(self.process * self.batch_size, (self.process + 1) * self.batch_size)
        rounds = range(index, index + workers * self.lanes, workers)
        needed = {(step * together + row) % self.lanes for step in rounds for row in own}
        lanes = _Lanes(self, needed)
        for number in count():
            lane = number % self.lanes
            block = next(lanes.blocks[lane], None) if lane in needed else None
            if block is None and lane in needed:
                return
            if number // together % workers == index:
                yield block if number % together in own else None


class _Lanes:
    """What one reader makes of a stream.

    Args:
        stream: the stream.
        needed: the lanes that it tokenizes.

    Attributes:
        blocks: of each of those lanes, endless if the stream repeats.
    """

    def __init__(self, stream: PackedStream, needed: set[int]) -> None:
        self.stream = stream
        self._full: set[int] = set()  # lanes that take no more of this pass
        self._queues: dict[int, deque[np.ndarray | None]] = {lane: deque() for lane in needed}
        self._source = self._passes()
        self.blocks = {lane: self._blocks(lane) for lane in needed}

    def _blocks(self, lane: int) -> Iterator[Block]:
        stream = self.stream
        while True:
            documents, found = self._documents(lane), False
            packed = pack(documents, stream.block_size, stream.tokenizer.pad_token_id)
            for block in islice(packed, stream.max_blocks):
                found = True
                yield block
            if not found:
                raise UserError(
                    "no data left after packing: the stream holds no token"
                    if stream.lanes == 1
                    else f"stream_lanes={stream.lanes}, but the stream holds fewer documents: "
                    "pass stream_lanes=1"
                )
            if not stream.repeat:
                return
            self._full.add(lane)
            for _ in documents:  # to the end of the pass
                pass
            self._full.discard(lane)

    def _documents(self, lane: int) -> Iterator[np.ndarray]:
        """Of a lane in one pass; what is read on the way waits in the queues of the others."""
        queue = self._queues[lane]
        while True:
            while not queue:
                owner, document = next(self._source)
                self._queues[owner].append(document)
            tokens = queue.popleft()
            if tokens is None:
                return
            yield tokens

    def _passes(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """Lanes and tokens of documents; at the end of each pass, None for every lane."""
        while True:
            owners: deque[int] = deque()
            align = self._align()
            for tokens in tokenize_stream(self._texts(owners), self.stream.tokenizer):
                yield owners.popleft(), align(tokens)
            for lane in self._queues:
                yield lane, None

    def _texts(self, owners: deque[int]) -> Iterator[str]:
        """Texts of this reader's lanes in one pass, whose lanes go to `owners`."""
        sizes = [(0, lane) for lane in range(self.stream.lanes)]
        # `iter`, since plain iteration would deal files to loader workers.
        for rows in self.stream.documents.iter(batch_size=1):
            if len(self._full) == len(self._queues):
                return
            (text,) = rows[TEXT_KEY]
            size, lane = sizes[0]
            heapq.heapreplace(sizes, (size + len(text), lane))
            if lane in self._queues:
                owners.append(lane)
                yield text

    def _align(self) -> Callable[[np.ndarray], np.ndarray]:
        layout: Any = self.stream.layout
        if layout is None:
            return lambda tokens: tokens
        return lambda tokens: align_document(tokens, **layout)
