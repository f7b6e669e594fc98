"""A batch that is being continued: prefill, then chunk after chunk on memory allocated once.

`prefill` reads the prompts, `first_chunk` respects what they give of it, `decode_step` does
everything else: embedding of the last chunk, backbone, head, decoder and choice. With a fixed cache
and a capturable predictor it has fixed shapes and reads nothing back, so that a CUDA graph can
replay it (`calm.decoding.engine.cuda_graph`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calm.decoding.engine.backbone import CachedBackbone
from calm.decoding.engine.kv_cache import KVCache
from calm.decoding.engine.predictors import Predictor
from calm.decoding.sampling.chunk_distribution import Chunk

__all__ = ["Record", "State", "decode_step", "first_chunk", "prefill", "read_records"]


@dataclass
class State:
    """What a step reads and moves on.

    Attributes:
        predictor: the model and its sampling.
        trunk: its backbone.
        cache: keys and values so far.
        seed: of the next chunk, int64 ``[B, 2]``; a step advances its offset by one.
        tokens: the last chunk, ``[B, K]``, which the next step reads.
    """

    predictor: Predictor
    trunk: CachedBackbone
    cache: KVCache
    seed: Tensor
    tokens: Tensor

    @classmethod
    def allocate(
        cls,
        predictor: Predictor,
        trunk: CachedBackbone,
        *,
        batch_size: int,
        capacity: int,
        is_fixed: bool = False,
    ) -> "State":
        """For `batch_size` sequences of at most `capacity` chunks."""
        cache = trunk.allocate(batch_size, capacity, is_fixed=is_fixed)
        seed = cache.starts.new_zeros(batch_size, 2)
        tokens = cache.starts.new_zeros(batch_size, predictor.patch_size)
        return cls(predictor, trunk, cache, seed, tokens)

    def select(self, rows: list[int]) -> "State":
        """The sequences `rows` alone."""
        index = torch.tensor(rows, device=self.seed.device)
        return State(
            self.predictor,
            self.trunk,
            self.cache.select(index),
            self.seed[index],
            self.tokens[index],
        )


class Record(NamedTuple):
    """What one chunk of one sequence was, as the host reads it; fields as in `Chunk`."""

    tokens: list[int]
    level: int
    draws: int
    is_fallback: bool
    is_finite: bool
    saved: int


def prefill(state: State, input_ids: Tensor, starts: list[int], seed: Tensor) -> Tensor:
    """Read prompts.

    Args:
        state: is begun anew.
        input_ids: whole chunks, ``[B, P * K]``, ending in the last column; any ids before a start.
        starts: first chunk of each sequence, at most P - 1.
        seed: int64 ``[B, 2]``; chunk i draws from it advanced by i.

    Returns: states ``[B, H]`` after the prompts.
    """
    state.seed.copy_(seed)
    return state.trunk.prefill(state.predictor.embed(input_ids), starts, state.cache)


def first_chunk(state: State, hidden: Tensor, given: Tensor, given_length: list[int]) -> Tensor:
    """The first new chunk; `given` ``[B, K]`` begins with what the prompts hold of it."""
    if any(given_length):
        length = torch.tensor(given_length, device=hidden.device)
        chunk = state.predictor.complete(hidden, given, length, state.seed)
    else:
        chunk = state.predictor.choose(hidden, state.seed)
    return _advance(state, chunk)


def decode_step(state: State) -> Tensor:
    """One chunk for each sequence: tokens and how they were found, as `read_records` takes it."""
    hidden = state.trunk.step(state.predictor.embed(state.tokens), state.cache)
    return _advance(state, state.predictor.choose(hidden, state.seed))


def read_records(steps: list[Tensor]) -> list[list[Record]]:
    """For each of some steps what each sequence's chunk was; this waits for the device."""
    packed = steps[0][None] if len(steps) == 1 else torch.stack(steps)
    return [
        [Record(row[:-5], row[-5], row[-4], bool(row[-3]), bool(row[-2]), row[-1]) for row in step]
        for step in packed.tolist()
    ]


def _advance(state: State, chunk: Chunk) -> Tensor:
    """Keep the chunk as the next input, and pack it, int64 ``[B, K + 5]``."""
    state.tokens.copy_(chunk.tokens)
    state.seed[:, 1] += 1
    saved = torch.zeros_like(chunk.draws) if chunk.saved is None else chunk.saved
    about = torch.stack([chunk.level, chunk.draws, chunk.is_fallback, chunk.is_finite, saved], 1)
    return torch.cat([chunk.tokens, about], dim=1)
