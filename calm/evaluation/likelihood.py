"""How likely a continuation of a text is, for models that know it: the token baseline, and a CALM
that has kept its readout (`calm.models.readout`). A head that is trained by the energy score has no
likelihood.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from calm.decoding.text.prompt import left_aligned
from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.evaluation.samplers import LOGITS_AT_A_TIME
from calm.models import ContinuousTransformer

__all__ = ["Likelihood", "continuation_likelihoods"]

Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        log_probability: natural logarithm, summed over its tokens.
        is_greedy: whether each of its tokens is the likeliest one after those before it.
    """

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class _Row:
    """A text as the model reads it: ids, and the indices of those that are scored."""

    ids: list[int]
    scored: range


@torch.no_grad()
def continuation_likelihoods(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int = 8
) -> list[Likelihood]:
    """Sum over the continuation's tokens of ln P(token | context, the tokens before it).

    The tokens of a chunk in which the continuation begins condition the rest of that chunk, so that
    the two may meet anywhere. A context that is too long loses its beginning, in whole chunks.

    Args:
        model: the token baseline, or a CALM with a readout.
        pairs: token ids of context and continuation.
        batch_size: texts in one forward pass; does not change the result.

    Raises:
        UserError: a model that knows no likelihood; an empty continuation; fewer tokens before it,
            within what the model reads, than one, or than K for a CALM without a start chunk.
    """
    reader = _of_chunks(model) if isinstance(model, ContinuousTransformer) else _OfTokens(model)
    rows = [_row(reader, *pair) for pair in pairs]
    found: list[Likelihood] = []
    with evaluating(model):
        for begin in range(0, len(rows), batch_size):
            found += _likelihoods(reader, rows[begin : begin + batch_size])
    return found


class _OfTokens:
    """The token baseline: a hidden state for each token, which tells the next one."""

    first = 1  # tokens that are read before the first that is scored
    size = 1
    start: tuple[int, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model

    def features(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to what the logits of the tokens from the second on are products of."""
        return self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state

    def logits(self, features: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., V]``."""
        return self.model.lm_head(features)


class _OfChunks:
    """A CALM's readout: a hidden state for each chunk, and the chunk's tokens before each."""

    def __init__(self, model: ContinuousTransformer) -> None:
        self.model, self.readout = model, model.slot_readout()
        self.first = self.size = model.patch_size
        token = model.start_token_id
        self.start = () if token is None else (token,) * self.size

    def features(self, ids: Tensor) -> Tensor:
        """``[B, P*K]`` to what the logits of the tokens from the second chunk on are products of.

        Returns: ``[B, (P-1)*K, H]``.
        """
        hidden = self.model(ids[:, : -self.size]).last_hidden_state
        chunks = ids[:, self.size :].unflatten(1, (-1, self.size))
        return self.readout.features(hidden, chunks).flatten(1, 2)

    def logits(self, features: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., V]``."""
        return self.readout.logits(features)


def _of_chunks(model: ContinuousTransformer) -> _OfChunks:
    if model.token_readout is None:
        raise UserError(
            f"a {type(model).__name__} is trained without likelihood and cannot tell that of a "
            "text: generate and compare texts instead, or train one that keeps a readout of tokens "
            "(docs/readout.md)"
        )
    return _OfChunks(model)


def _row(reader: Any, context: Sequence[int], continuation: Sequence[int]) -> _Row:
    """The text with its start chunk, or its end if it is too long; whole chunks."""
    if not continuation:
        raise UserError("a continuation must hold at least one token, got none")
    room = reader.model.config.max_position_embeddings * reader.size
    text = [*context, *continuation]
    ids = [*reader.start, *text]
    if len(ids) > room:
        surplus = max(0, len(text) - room)
        ids = text[-(-surplus // reader.size) * reader.size :]
    scored = range(len(ids) - len(continuation), len(ids))
    if scored.start < reader.first:
        raise UserError(
            f"a continuation must have at least {reader.first} tokens before it that the model "
            f"reads with it, {room} in all; got a context of {len(context)} and a continuation of "
            f"{len(continuation)} tokens"
        )
    return _Row(ids, scored)


def _likelihoods(reader: Any, rows: Sequence[_Row]) -> Iterator[Likelihood]:
    longest = max(len(row.ids) for row in rows)
    width = -(-longest // reader.size) * reader.size
    ids = left_aligned([row.ids for row in rows], fill=0, width=width).to(reader.model.device)
    features = reader.features(ids)
    wanted = ids[:, reader.first :]
    places = [torch.arange(r.scored.start, r.scored.stop) - reader.first for r in rows]
    tokens = torch.cat([row[place] for row, place in zip(wanted, places, strict=True)])
    scored = torch.cat([row[place] for row, place in zip(features, places, strict=True)])
    size = max(1, LOGITS_AT_A_TIME // reader.model.config.vocab_size)
    nats, greedy = [], []
    for some, targets in zip(scored.split(size), tokens.split(size), strict=True):
        logits = reader.logits(some).float()
        nats.append(F.cross_entropy(logits, targets, reduction="none"))
        greedy.append(logits.argmax(-1) == targets)
    lengths = [len(place) for place in places]
    parts = zip(torch.cat(nats).split(lengths), torch.cat(greedy).split(lengths), strict=True)
    for loss, is_likeliest in parts:
        yield Likelihood(-float(loss.double().sum()), bool(is_likeliest.all()))
