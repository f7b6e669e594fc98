"""The text so far: which sequences have ended, what is padding, what a streamer gets to see."""

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from calm.decoding.prompt import Prompt, pads_last
from calm.errors import UserError

__all__ = ["Transcript", "end_tokens"]


def end_tokens(eos_token_id: int | list[int] | None, device: torch.device) -> Tensor:
    """The ids that end a sequence, ``[number of ids]``, possibly none."""
    ids = [] if eos_token_id is None else eos_token_id
    return torch.tensor(ids, dtype=torch.int64, device=device).reshape(-1)


class Transcript:
    """Sequences that grow chunk by chunk.

    Args:
        prompt: where they begin.
        end_ids: see `end_tokens`.
        pad_token_id: follows the end of a sequence; needed where one may end before another.
        limit: tokens after which no chunk is added; counts the prompt's padding.
        may_overshoot: keep all tokens of the last chunk instead of cutting at `limit`.
        streamer: receives new tokens as they are appended.

    Attributes:
        new_tokens: generated tokens of each sequence, ``[B]``.
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        end_ids: Tensor,
        pad_token_id: int | None,
        limit: int,
        may_overshoot: bool,
        streamer: BaseStreamer | None,
    ) -> None:
        batch = len(prompt.input_ids)
        if pad_token_id is None and batch > 1 and len(end_ids):
            raise UserError(
                "config.pad_token_id is None, and sequences of a batch may end at different "
                "places; set it, or generate one at a time"
            )
        self.parts = [prompt.input_ids]
        self.length = prompt.input_ids.shape[1]
        self.given = prompt.given.shape[1]  # tokens of the next chunk that the prompt holds
        self.end_ids, self.pad_token_id = end_ids, pad_token_id
        self.limit, self.may_overshoot = limit, may_overshoot
        self.streamer = streamer
        self.has_ended = torch.zeros(batch, dtype=torch.bool, device=end_ids.device)
        self.new_tokens = torch.zeros(batch, dtype=torch.int64, device=end_ids.device)

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has ended or is long enough."""
        return self.length >= self.limit or bool(self.has_ended.all())

    def append(self, tokens: Tensor) -> None:
        """Add one chunk ``[B, K]``; sequences that have ended get padding instead."""
        if self.pad_token_id is not None:
            tokens = tokens.masked_fill(self.has_ended[:, None], self.pad_token_id)
        self.length += tokens.shape[1]
        surplus = 0 if self.may_overshoot else max(0, self.length - self.limit)
        tokens = tokens[:, : tokens.shape[1] - surplus]
        self.parts.append(tokens)
        fresh = tokens[:, self.given :]
        self.given = 0
        self.new_tokens += (~self.has_ended) * fresh.shape[1]
        self.has_ended |= torch.isin(fresh, self.end_ids).any(-1)
        if self.streamer is not None:
            self.streamer.put(fresh.cpu())

    def sequences(self, *, move_padding: bool) -> Tensor:
        """Prompt and continuation, ``[B, T]``; all pad tokens at the end with `move_padding`."""
        sequences = torch.cat(self.parts, dim=1)
        if move_padding and self.pad_token_id is not None:
            return pads_last(sequences, self.pad_token_id)
        return sequences
