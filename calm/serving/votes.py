"""The votes of a text, for a client that asks which chunks its candidates were."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from calm.decoding.chunk import ChunkRecord
from calm.decoding.engine.predictors import ChunkPredictor, Predictor
from calm.decoding.sampling.methods import Batch
from calm.decoding.sampling.tallied_vote import TalliedBatch, Tally
from calm.decoding.text.edges import CONTEXT, texts_after

__all__ = ["VoteWatch"]


class VoteWatch:
    """What the candidates of one text's chunks were.

    Args:
        num_shown: the most frequent chunks of a vote that the client is told.
        tokenizer: turns tokens into text.
    """

    def __init__(self, num_shown: int, tokenizer: Any) -> None:
        self.num_shown, self.tokenizer = num_shown, tokenizer
        self._tally: Tally | None = None

    def watched(self, predictor: Predictor) -> Predictor:
        """A predictor of the same choices whose votes are seen here, if it votes."""
        if not (isinstance(predictor, ChunkPredictor) and isinstance(predictor.method, Batch)):
            return predictor
        method = TalliedBatch(**asdict(predictor.method), receive=self._receive)
        return replace(predictor, method=method)

    def take(self, before: Sequence[int], given: int, record: ChunkRecord) -> dict[str, Any] | None:
        """The vote that chose a chunk, once; None where there was no vote.

        All its numbers add up to the draws of the chunk.

        Args:
            before: tokens before the new ones.
            given: tokens of the chunk that the prompt holds.
            record: the chunk.
        """
        tally, self._tally = self._tally, None
        if tally is None:
            return None
        chosen, shown = tuple(record.tokens), tally.most_common(self.num_shown)
        if chosen in tally and chosen not in dict(shown):
            shown.append((chosen, tally[chosen]))
        texts = texts_after(
            self.tokenizer,
            before[-CONTEXT:],
            [tokens[given:] for tokens, _ in shown],
            skip_special_tokens=False,
        )
        candidates = [
            {
                "text": text,
                "ids": list(tokens[given:]),
                "count": count,
                "is_chosen": tokens == chosen,
            }
            for text, (tokens, count) in zip(texts, shown, strict=True)
        ]
        num_shown = sum(count for _, count in shown)
        return {
            "candidates": candidates,
            "others": tally.total() - num_shown,
            "rejected": record.draws - tally.total(),
        }

    def _receive(self, tallies: list[Tally]) -> None:
        (self._tally,) = tallies  # votes run slot by slot
