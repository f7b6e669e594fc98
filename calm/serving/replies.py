"""What is sent back: OpenAI's objects, with the figures of chunks under ``calm``."""

import json
import secrets
import time
from dataclasses import asdict, replace
from typing import Any

from calm.serving.models import ServedModel, Settings
from calm.serving.texts import Piece

__all__ = ["DONE", "Reply", "event", "model_object"]

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """One server-sent event, in ASCII: some clients end a line at U+0085 or U+2028 too."""
    return f"data: {json.dumps(content)}\n\n"


def model_object(served: ServedModel) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "calm",
        "calm": {
            "kind": type(served.model).__name__,
            "patch_size": served.patch_size,
            "context": served.context,
        },
    }


class _Choice:
    """What was received of one text."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def figures(self, *, has_votes: bool) -> dict[str, Any]:
        """Sums over its chunks, as `calm generate --json` names them, and each chunk's vote."""
        records = [piece.record for piece in self.pieces]
        votes = {"votes": [piece.vote for piece in self.pieces]} if has_votes else {}
        return {
            "chunks": len(records),
            "draws": sum(record.draws for record in records),
            "draws_saved": sum(record.saved for record in records),
            "mean_level": sum(record.num_agreeing for record in records) / len(records),
            "fallbacks": sum(record.is_fallback for record in records),
            **votes,
        }


class Reply:
    """The reply to one request, as an object or as events.

    Args:
        served: the model.
        settings: how its texts are sampled.
        num_texts: how many.
        prompt_tokens: of all prompts.
        is_chat: messages rather than texts.
        has_votes: with the vote of each chunk.
        is_stream: events are all that is sent, so that votes are not kept for a whole reply.
    """

    def __init__(
        self,
        served: ServedModel,
        settings: Settings,
        *,
        num_texts: int,
        prompt_tokens: int,
        is_chat: bool,
        has_votes: bool,
        is_stream: bool,
    ) -> None:
        self.is_chat, self.has_votes, self.prompt_tokens = is_chat, has_votes, prompt_tokens
        self.is_stream = is_stream
        self._choices = [_Choice() for _ in range(num_texts)]
        self._common = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.name,
            "calm": asdict(settings),
        }

    def add(self, index: int, piece: Piece) -> dict[str, Any]:
        """Keep what a chunk adds to text `index`; the event that says so."""
        is_first = not self._choices[index].pieces
        self._choices[index].pieces.append(replace(piece, vote=None) if self.is_stream else piece)
        record = piece.record
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": piece.finish_reason,
            "logprobs": None,
            "calm": {
                "tokens": piece.num_tokens,
                "draws": record.draws,
                "draws_saved": record.saved,
                "level": record.num_agreeing,
                "is_fallback": record.is_fallback,
            },
        }
        if self.has_votes:
            choice["calm"]["vote"] = piece.vote
        if self.is_chat:
            role = {"role": "assistant"} if is_first else {}
            choice["delta"] = {**role, "content": piece.text}
        else:
            choice["text"] = piece.text
        return self._object([choice], is_chunk=True)

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and texts; an end token counts."""
        new = sum(piece.num_tokens for choice in self._choices for piece in choice.pieces)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def usage_event(self) -> dict[str, Any]:
        """The last event of a stream that asked for it."""
        return {**self._object([], is_chunk=True), "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """The reply without a stream."""
        choices = [self._whole_choice(index) for index in range(len(self._choices))]
        return {**self._object(choices, is_chunk=False), "usage": self.usage()}

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        text: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            text = {"message": {"role": "assistant", "content": choice.text}}
        return {
            "index": index,
            **text,
            "finish_reason": choice.pieces[-1].finish_reason,
            "logprobs": None,
            "calm": choice.figures(has_votes=self.has_votes),
        }

    def _object(self, choices: list[dict[str, Any]], *, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {**self._common, "object": kind, "choices": choices}
