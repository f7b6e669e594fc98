"""A batch that is being continued: prefill, then chunk after chunk on memory allocated once.

`prefill` reads the prompts. `first_chunk` draws the first chunk, given the tokens of it that the
prompts end with. `decode_step` does everything else: embedding of the last chunk, backbone, head,
decoder and choice. With a fixed cache and a capturable predictor a step has fixed shapes and does
not synchronise, so that a CUDA graph can replay it (`calm.decoding.engine.cuda_graph`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calm.decoding.engine.backbone import CachedBackbone
from calm.decoding.engine.kv_cache import KVCache
from calm.decoding.engine.predictors import Predictor
from calm_kernels import advance_state

__all__ = ["DecodeState", "advance", "decode_step", "first_chunk", "next_hidden", "prefill"]


@dataclass
class DecodeState:
    """What a decode step reads and advances.

    Attributes:
        predictor: the model and its sampling.
        backbone: the model's backbone.
        cache: keys and values so far.
        seed: of the next chunk, int64 ``[B, 2]``; a step advances its offset by one.
        tokens: the last chunk, ``[B, K]``, which the next step reads.
    """

    predictor: Predictor
    backbone: CachedBackbone
    cache: KVCache
    seed: Tensor
    tokens: Tensor

    @classmethod
    def allocate(
        cls, predictor: Predictor, *, batch_size: int, capacity: int, is_fixed: bool = False
    ) -> "DecodeState":
        """For `batch_size` sequences of at most `capacity` chunks; for `is_fixed` see `KVCache`."""
        backbone = CachedBackbone(predictor.backbone)
        cache = backbone.allocate(batch_size, capacity, is_fixed=is_fixed)
        seed = cache.lengths.new_zeros(batch_size, 2)
        tokens = cache.lengths.new_zeros(batch_size, predictor.patch_size)
        return cls(predictor, backbone, cache, seed, tokens)

    def select(self, rows: list[int]) -> "DecodeState":
        """The sequences `rows` alone."""
        index = torch.tensor(rows, device=self.seed.device)
        return DecodeState(
            self.predictor,
            self.backbone,
            self.cache.select(index),
            self.seed[index],
            self.tokens[index],
        )

    def slot(self, row: int) -> "DecodeState":
        """One sequence, as a state of B = 1 in this state's memory."""
        one = slice(row, row + 1)
        return DecodeState(
            self.predictor, self.backbone, self.cache.slot(row), self.seed[one], self.tokens[one]
        )


def prefill(state: DecodeState, input_ids: Tensor, lengths: list[int], seed: Tensor) -> Tensor:
    """Read prompts.

    Args:
        state: what it held is overwritten.
        input_ids: whole chunks, ``[B, P * K]``, from the first column on; any ids after an end.
        lengths: chunks of each prompt, 1 to P, the longest P.
        seed: int64 ``[B, 2]``; chunk i draws from it advanced by i.

    Returns: hidden states ``[B, H]`` after the prompts.
    """
    state.seed.copy_(seed)
    return state.backbone.prefill(state.predictor.embed(input_ids), lengths, state.cache)


def first_chunk(
    state: DecodeState, hidden: Tensor, given: Tensor, given_length: list[int]
) -> Tensor:
    """The first new chunk; of `given` ``[B, K]`` the first `given_length` are prompt tokens."""
    if any(given_length):
        length = torch.tensor(given_length, device=hidden.device)
        chunk = state.predictor.complete(hidden, given, length, state.seed)
    else:
        chunk = state.predictor.choose(hidden, state.seed)
    advance_state(chunk.packed, state.tokens, state.seed, None)
    return chunk.packed


def decode_step(state: DecodeState) -> Tensor:
    """One chunk for each sequence, packed as `Chunk.packed`."""
    return advance(state, state.predictor.choose(next_hidden(state), state.seed).packed)


def next_hidden(state: DecodeState) -> Tensor:
    """Read the last chunk of each sequence into the next column: hidden states ``[B, H]``."""
    return state.backbone.decode_step(state.predictor.embed(state.tokens), state.cache)


def advance(state: DecodeState, packed: Tensor) -> Tensor:
    """Keep packed chunks as the next input, move seed and cache on, and return the chunks."""
    advance_state(packed, state.tokens, state.seed, state.cache.lengths)
    state.cache.length += 1
    return packed
