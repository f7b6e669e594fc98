"""The text so far: which sequences have ended, and what a streamer receives."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from calm.decoding.chunk import ChunkRecord
from calm.decoding.text.prompt import Prompt
from calm.decoding.text.stopping import StopStrings
from calm.errors import UserError

__all__ = ["Transcript"]


class Transcript:
    """Sequences that grow chunk by chunk, on the host.

    Args:
        prompts: where they begin.
        ends: tokens that end a sequence.
        keeps_tail: keep what follows an end token in its chunk (published).
        stops: strings that end a sequence, or None.
        streamer: receives prompt and new tokens; for one sequence.

    Attributes:
        new: generated tokens of each sequence.
        records: the record of each of its chunks.
        has_ended: whether each has.
        has_stopped: whether an end token or a stop string ended it, rather than its budget.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        ends: Sequence[int],
        keeps_tail: bool,
        stops: StopStrings | None,
        streamer: BaseStreamer | None,
    ) -> None:
        self.prompts = prompts
        self.ends, self.keeps_tail, self.stops = frozenset(ends), keeps_tail, stops
        self.streamer = streamer
        self.new: list[list[int]] = [[] for _ in prompts]
        self.records: list[list[ChunkRecord]] = [[] for _ in prompts]
        self.has_ended = [False] * len(prompts)
        self.has_stopped = [False] * len(prompts)
        if streamer is not None:
            streamer.put(torch.tensor([prompts[0].tokens], dtype=torch.int64))

    def append(self, row: int, record: ChunkRecord) -> None:
        """Add a chunk to a sequence; tokens after its end are dropped.

        Raises:
            UserError: it was drawn from numbers that are not finite.
        """
        if self.has_ended[row]:
            return
        if not record.is_finite:
            raise UserError(
                "the model gave latents or logits that are not finite: the weights are damaged or "
                "training diverged; load an earlier checkpoint"
            )
        prompt, new = self.prompts[row], self.new[row]
        given = 0 if self.records[row] else len(prompt.given)
        self.records[row].append(record)
        fresh = record.tokens[given:]
        if given and record.is_fallback and record.num_agreeing == 0:
            return  # no draw continues the prompt: the model reads padding, which is not text
        old_length = len(new)
        new += fresh[: prompt.budget - old_length]
        self.has_ended[row] = len(new) == prompt.budget
        self._end(row, old_length)
        if self.streamer is not None:
            with torch.inference_mode(False):  # a streamer may write to its tokens
                self.streamer.put(torch.tensor(new[old_length:], dtype=torch.int64))

    def _end(self, row: int, old_length: int) -> None:
        """End a sequence at an end token or stop string; those after `old_length` are new."""
        new = self.new[row]
        end = next((i for i in range(old_length, len(new)) if new[i] in self.ends), None)
        if end is not None:
            self.has_ended[row] = self.has_stopped[row] = True
            if not self.keeps_tail:
                del new[end + 1 :]
        if self.stops is not None:
            end = self.stops.cut(self.prompts[row].tokens, new, len(new) - old_length)
            if end is not None:
                self.has_ended[row] = self.has_stopped[row] = True
                del new[end:]

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has ended."""
        return all(self.has_ended)

    def sequences(self) -> list[list[int]]:
        """Prompt and new tokens of each sequence."""
        pairs = zip(self.prompts, self.new, strict=True)
        return [prompt.tokens + new for prompt, new in pairs]

    def table(self, name: str) -> torch.Tensor:
        """A field of all records, int64 ``[B, chunks]``; 0 after a sequence's end."""
        columns: list[Any] = [[getattr(r, name) for r in records] for records in self.records]
        return torch.tensor(list(zip_longest(*columns, fillvalue=0)), dtype=torch.int64).T
