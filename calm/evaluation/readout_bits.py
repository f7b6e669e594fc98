"""How likely a text is to a readout of a CALM's hidden states: bits of each chunk."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calm.decoding.sampling.token_draws import SlotReadout
from calm.errors import UserError
from calm.evaluation.brier import evaluating
from calm.evaluation.samplers import LOGITS_AT_A_TIME
from calm.evaluation.scores import Block, TextReader, TextScores
from calm.models import ContinuousTransformer

__all__ = ["BITS", "readout_bits"]

BITS = ("bits",)


def readout_bits(
    model: ContinuousTransformer,
    readout: SlotReadout,
    blocks: Iterable[Block],
    *,
    batch_size: int = 4,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> TextScores:
    """-log2 P(chunk) of a readout at every predicted chunk all of whose tokens count.

    Args:
        model: whose hidden states the readout reads.
        readout: of them.
        blocks: as `calm.evaluation.scores.score_text`, and what follows.
        batch_size: likewise.
        progress: likewise.
        describe: likewise.

    Returns: one score, ``bits`` of K tokens.
    Raises:
        UserError: no blocks, blocks of different lengths, no chunk all of whose tokens count.
    """
    size, device = model.patch_size, model.device
    reader = TextReader(blocks, batch_size, None, progress)
    with evaluating(model):
        for input_ids, labels, _ in reader:
            hidden = model(input_ids[:, :-size].to(device)).last_hidden_state
            wanted = labels[:, size:].to(device).unflatten(1, (-1, size))
            tokens = wanted.clamp(min=0)
            nats = _cross_entropy(readout, readout.features(hidden, tokens), tokens)
            bits = nats.double().sum(-1, keepdim=True) / math.log(2)
            reader.add(bits, (wanted >= 0).all(-1), size + size * torch.arange(wanted.shape[1]))
    settings = {"positions_are": f"every predicted chunk of {size} tokens that all count"}
    scores = reader.scores(model, BITS, describe or {}, settings)
    if not len(scores.offsets):
        raise UserError("no position is left to measure: no chunk of the text is whole")
    return scores


def _cross_entropy(readout: SlotReadout, features: Tensor, tokens: Tensor) -> Tensor:
    """Of each token ``[...]`` given ``[..., H]``; logits of a few rows at a time."""
    size = max(1, LOGITS_AT_A_TIME // readout.vocab_size)
    wanted = tokens.flatten()
    parts = [
        F.cross_entropy(readout.logits(part).float(), target, reduction="none")
        for part, target in zip(
            features.flatten(0, -2).split(size), wanted.split(size), strict=True
        )
    ]
    return torch.cat(parts).view(tokens.shape)
