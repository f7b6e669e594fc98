"""Texts that come and go: slots of one batch, whose shapes never change.

All slots, used or not, take part in every decode step, and each has a length, a seed and a sampling
method of its own. A prompt is read into its slot alone, in the shape of that prompt. So what a text
says depends on its prompt, its seed and its method, but on no other text, not even by rounding.

Methods that take one draw run on all slots at once. Methods that choose among many draws run slot
by slot: the draws of one slot are a batch already, and a vote decodes as many as it needs.
"""

import torch
from torch import Tensor

from calm.decoding.chunk import ChunkRecord, read_records
from calm.decoding.engine.decode_step import DecodeState, advance, next_hidden
from calm.decoding.engine.predictors import Predictor
from calm.decoding.loop import draw_first, read
from calm.decoding.text.prompt import Prompt

__all__ = ["SlotBatch"]


class SlotBatch:
    """Slots for texts of one model, on a cache that is allocated once.

    Args:
        predictor: of the model; its sampling does not matter.
        num_slots: W, texts at a time.
        capacity: chunks of prompt and text, at most.
    """

    def __init__(self, predictor: Predictor, *, num_slots: int, capacity: int) -> None:
        self._state = DecodeState.allocate(
            predictor, batch_size=num_slots, capacity=capacity, is_fixed=True
        )
        self._predictors: list[Predictor | None] = [None] * num_slots
        self._lengths = [0] * num_slots  # chunks in the cache
        self._is_used = torch.zeros_like(self._state.cache.lengths)  # 0 or 1, int64 [W]

    @property
    def used(self) -> list[int]:
        """Slots that hold a text."""
        return [slot for slot, used in enumerate(self._predictors) if used is not None]

    @property
    def free_slot(self) -> int | None:
        """A slot without text, or None."""
        return next((slot for slot, used in enumerate(self._predictors) if used is None), None)

    @torch.inference_mode()
    def begin(self, slot: int, prompt: Prompt, predictor: Predictor, seed: Tensor) -> ChunkRecord:
        """Read a prompt into a free slot and draw its first chunk.

        Args:
            slot: its number.
            prompt: with its budget it has room in the cache.
            predictor: how its chunks are chosen.
            seed: of its draws, int64 ``[1, 2]``, as `sequence_seeds` gives them.
        """
        state = self._state.slot(slot)
        state.predictor = predictor
        first = draw_first(state, read(state, [prompt], seed), [prompt])
        self._predictors[slot] = predictor
        self._lengths[slot] = state.cache.length
        self._is_used[slot] = 1
        return read_records([first])[0][0]

    @torch.inference_mode()
    def step(self) -> dict[int, ChunkRecord]:
        """The next chunk of every text, by slot."""
        used, state = self.used, self._state
        state.cache.length = max(self._lengths[slot] for slot in used)
        packed = advance(state, self._choose(next_hidden(state)))
        state.cache.lengths *= self._is_used  # an empty slot stays in its first column
        for slot in used:
            self._lengths[slot] += 1
        records = read_records([packed])[0]
        return {slot: records[slot] for slot in used}

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        """Forget the text of a slot."""
        self._predictors[slot] = None
        self._lengths[slot] = 0
        self._is_used[slot] = 0
        self._state.cache.lengths[slot] = 0

    def _choose(self, hidden: Tensor) -> Tensor:
        """The chunks after hidden states ``[W, H]``, packed; zeros in empty slots."""
        state = self._state
        packed = state.seed.new_zeros(len(hidden), state.predictor.patch_size + 5)
        slots_of: dict[Predictor, list[int]] = {}
        for slot, predictor in enumerate(self._predictors):
            if predictor is not None:
                slots_of.setdefault(predictor, []).append(slot)
        for predictor, slots in slots_of.items():
            if predictor.is_one_draw:
                packed[slots] = predictor.choose(hidden, state.seed).packed[slots]
                continue
            for slot in slots:
                one = slice(slot, slot + 1)
                packed[one] = predictor.choose(hidden[one], state.seed[one]).packed
        return packed
