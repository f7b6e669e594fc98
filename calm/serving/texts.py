"""One text that is being written: its tokens, its characters, and when it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calm.decoding.chunk import ChunkRecord
from calm.decoding.engine.predictors import Predictor
from calm.decoding.text.edges import TextPieces
from calm.decoding.text.prompt import Prompt
from calm.decoding.text.stopping import StopStrings, TextBeforeStops
from calm.decoding.text.transcript import Transcript
from calm.serving.votes import VoteWatch

__all__ = ["Piece", "WrittenText"]


@dataclass(frozen=True)
class Piece:
    """What a chunk adds to a text.

    Attributes:
        text: whole characters that can be shown now, possibly none.
        num_tokens: tokens that it adds.
        record: the chunk.
        finish_reason: ``stop`` or ``length`` with the last piece.
        vote: that chose it, see `VoteWatch.take`; None without one, or if nobody asked for it.
    """

    text: str
    num_tokens: int
    record: ChunkRecord
    finish_reason: str | None
    vote: dict[str, Any] | None = None


class WrittenText:
    """A text in the queue or in a slot.

    Args:
        prompt: with its budget.
        predictor: how its chunks are chosen.
        seed: int64 ``[1, 2]``.
        ends: tokens that end it.
        stops: strings that end it, and are not part of it.
        tokenizer: turns tokens into text.
        send: takes each `Piece`, or the error that ended the text; called in the worker's thread.
        votes: hands on the votes of its chunks; None if nobody asked for them.

    Attributes:
        is_cancelled: nobody waits for it any more; the worker then frees its slot.
    """

    def __init__(
        self,
        prompt: Prompt,
        predictor: Predictor,
        seed: Tensor,
        *,
        ends: Sequence[int],
        stops: Sequence[str],
        tokenizer: Any,
        send: Callable[[Piece | Exception], None],
        votes: VoteWatch | None = None,
    ) -> None:
        self.prompt, self.seed, self.send, self._votes = prompt, seed, send, votes
        self.predictor = predictor if votes is None else votes.watched(predictor)
        self.is_cancelled = False
        self._transcript = Transcript(
            [prompt],
            ends=ends,
            keeps_tail=False,
            stops=StopStrings(list(stops), tokenizer) if stops else None,
            streamer=None,
        )
        self._pieces = TextPieces(tokenizer, prompt.tokens)
        self._shown = TextBeforeStops(stops)

    def add(self, record: ChunkRecord) -> bool:
        """Add a chunk and send what it adds; whether the text has ended.

        Raises:
            UserError: it was drawn from numbers that are not finite.
        """
        written, old_length = self._transcript, len(self._transcript.new[0])
        vote = self._vote(record)
        written.append(0, record)
        tokens = written.new[0][old_length:]
        text = self._shown.put(self._pieces.put(tokens))
        has_ended, reason = written.has_ended[0] or self._shown.is_stopped, None
        if has_ended:
            text += self._shown.put(self._pieces.end()) + self._shown.end()
            is_stopped = written.has_stopped[0] or self._shown.is_stopped
            reason = "stop" if is_stopped else "length"
        self.send(Piece(text, len(tokens), record, reason, vote))
        return has_ended

    def _vote(self, record: ChunkRecord) -> dict[str, Any] | None:
        """The vote of the next chunk."""
        if self._votes is None:
            return None
        given = 0 if self._transcript.records[0] else len(self.prompt.given)
        before = [*self.prompt.tokens, *self._transcript.new[0]]
        return self._votes.take(before, given, record)
