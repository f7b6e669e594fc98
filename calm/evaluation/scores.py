"""Scores of a model at every position of a text: what means, intervals and comparisons are made of.

A position is named by its place in the text: how many tokens that count precede it. Chunk size,
block size and start chunks do not change that number, so that models of any K meet at the positions
which they share (`calm.evaluation.paired`).
"""

import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.environment import installed_version
from calm.errors import UserError
from calm.evaluation.bootstrap import ORDERS
from calm.evaluation.brier import evaluating, position_scores
from calm.evaluation.samplers import ChunkSampler, make_sampler
from calm_kernels.noise import as_seed

__all__ = ["Block", "TextReader", "TextScores", "score_draws", "score_text"]

Block = Mapping[str, Any] | Sequence[int] | Tensor


@dataclass(frozen=True)
class TextScores:
    """Scores of the positions of a text, in their order: Brier-1 to Brier-4, or others (C of them).

    Attributes:
        offsets: place in the text of the first token of each n-gram, int64 ``[P]``.
        terms: the scores, float64 ``[P, C]``.
        blocks: index of the block that each lies in, int64 ``[P]``.
        text: all tokens that count, int32 ``[tokens]``.
        protocol: settings, data hash, model and versions.
        names: of the C scores.
    """

    offsets: Tensor
    terms: Tensor
    blocks: Tensor
    text: Tensor
    protocol: dict[str, Any]
    names: tuple[str, ...] = ORDERS

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums ``[blocks, C]`` and counts ``[blocks]``, float64; a block may have no position."""
        return _sums_by(self.blocks, self.terms, self.protocol["blocks"])

    def grouped(self, span: int) -> tuple[Tensor, Tensor]:
        """As `sums`, of spans of `span` tokens of the text; those without a position are dropped.

        Spans do not depend on the block layout: models with equal `offsets` have equal counts.
        """
        if span < 1:
            raise UserError(f"span must be at least 1 token, got {span}")
        _, group = torch.unique(self.offsets // span, return_inverse=True)
        return _sums_by(group, self.terms, int(group.max()) + 1 if len(group) else 0)

    def select(self, mask: Tensor) -> "TextScores":
        """The positions where `mask` (bool ``[P]``) is true."""
        return replace(
            self,
            offsets=self.offsets[mask],
            terms=self.terms[mask],
            blocks=self.blocks[mask],
            protocol={**self.protocol, "positions": int(mask.sum())},
        )

    def starting_at_multiples_of(self, tokens: int) -> "TextScores":
        """The n-grams that start at a multiple of `tokens` tokens of the text."""
        if tokens < 1:
            raise UserError(f"tokens must be at least 1, got {tokens}")
        chosen = self.select(self.offsets % tokens == 0)
        chosen.protocol["positions_are"] += f", at multiples of {tokens} tokens of the text"
        return chosen


def score_text(
    model: PreTrainedModel,
    blocks: Iterable[Block],
    *,
    num_samples: int = 8,
    brier_draws: int | None = None,
    noise_scale: float = 1.0,
    noise_spread: float = 1.0,
    method: str = "direct",
    skip_repeats: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    max_blocks: int | None = None,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> TextScores:
    """Brier-1 to Brier-4 of `model` at every position of `blocks`, with the protocol.

    Args:
        model: a CALM or the token baseline; runs where its parameters are.
        blocks: token sequences of one length: token ids, or mappings with ``input_ids`` and
            optionally ``labels`` (negative where a position does not count).
        num_samples: N, draws of each chunk.
        brier_draws: None uses all of them, 2 is the published estimator.
        noise_scale: factor on the head's noise.
        noise_spread: factor on what the noise contributes, see `GenerativeHead.sample`.
        method: what draws: the head of a CALM (``direct``) or its ``readout``.
        skip_repeats: skip n-grams of one repeated token.
        seed: of the draws, and of the bootstrap of those who summarise the scores.
        batch_size: blocks in one forward pass; does not change the result.
        max_blocks: stop after this many blocks.
        progress: wraps the iterator over batches, for a progress bar.
        describe: what else to record in the protocol (model and data as the user named them).

    Returns: the `TextScores`.
    Raises:
        UserError: no blocks, blocks of different lengths, bad arguments.
    """
    sampler = make_sampler(
        model,
        num_samples=num_samples,
        brier_draws=brier_draws,
        noise_scale=noise_scale,
        noise_spread=noise_spread,
        method=method,
        seed=as_seed(seed, next(model.parameters()).device),
    )
    settings = {
        "num_samples": num_samples,
        "brier_draws": "all" if brier_draws is None else brier_draws,
        "noise_scale": noise_scale,
        "noise_spread": noise_spread,
        "method": method,
        "seed": seed,
    }
    return score_draws(
        sampler,
        blocks,
        settings=settings,
        skip_repeats=skip_repeats,
        batch_size=batch_size,
        max_blocks=max_blocks,
        progress=progress,
        describe=describe,
    )


def score_draws(
    sampler: ChunkSampler,
    blocks: Iterable[Block],
    *,
    settings: Mapping[str, Any],
    skip_repeats: bool = False,
    batch_size: int = 4,
    max_blocks: int | None = None,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> TextScores:
    """As `score_text`, of what `sampler` draws: a model's head, or anything else that draws chunks.

    Args:
        sampler: see `calm.evaluation.samplers`; its predictor's model reads the text.
        blocks: as `score_text`.
        settings: what the protocol says of the draws; ``seed`` among them.
        skip_repeats: likewise, and what follows.
        batch_size: likewise.
        max_blocks: likewise.
        progress: likewise.
        describe: likewise.
    """
    model = sampler.predictor.model
    device = next(model.parameters()).device
    size = sampler.predictor.patch_size
    reader = TextReader(blocks, batch_size, max_blocks, progress)
    with evaluating(model):
        for input_ids, labels, first_block in reader:
            scores = position_scores(
                sampler,
                input_ids.to(device),
                labels.to(device),
                skip_repeats=skip_repeats,
                first_row=first_block * input_ids.shape[1] // size,
            )
            reader.add(*scores)
    layout = {
        "positions_are": _position_rule(size),
        "start_chunks": sampler.predictor.start_token_id is not None,
        "estimator": sampler.estimator,
        "skip_repeats": skip_repeats,
    }
    return reader.scores(model, ORDERS, describe or {}, {**layout, **settings})


class TextReader:
    """Blocks in batches, and where what is measured in them lies in the text.

    Args:
        blocks: as `score_text`, and what follows.
        batch_size: likewise.
        max_blocks: likewise.
        progress: likewise.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        batch_size: int,
        max_blocks: int | None,
        progress: Callable[[Iterator[Any]], Iterable[Any]],
    ) -> None:
        self._batches = progress(_batches(islice(blocks, max_blocks), batch_size))
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._texts: list[Tensor] = []
        self._length = self._blocks = self._tokens = 0
        self._labels: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Input ids and labels ``[B, T]``, and the index of the first block of each batch."""
        for input_ids, labels in self._batches:
            self._labels = labels
            self._length = self._length or input_ids.shape[1]
            if input_ids.shape[1] != self._length:
                raise UserError(
                    f"blocks must have one length; got {self._length} and {input_ids.shape[1]} "
                    "tokens"
                )
            yield input_ids, labels, self._blocks
            self._texts.append(labels[labels >= 0])
            self._tokens += len(self._texts[-1])
            self._blocks += len(input_ids)

    def add(self, terms: Tensor, is_counted: Tensor, token: Tensor) -> None:
        """Add scores of the batch: see `PositionScores`, with any number of scores a position."""
        terms, is_counted, token = terms.cpu(), is_counted.cpu(), token.cpu()
        labels = self._labels
        places = self._tokens + (labels >= 0).flatten().cumsum(0).view_as(labels) - 1
        block = self._blocks + torch.arange(len(labels))[:, None].expand_as(is_counted)
        self._parts.append((places[:, token][is_counted], terms[is_counted], block[is_counted]))

    def scores(
        self,
        model: PreTrainedModel,
        names: tuple[str, ...],
        describe: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> TextScores:
        """All that was added, with the protocol."""
        if not self._parts:
            raise UserError(
                "there are no blocks to evaluate; use more text or a smaller block size"
            )
        offsets, terms, block = (torch.cat(part) for part in zip(*self._parts, strict=True))
        text = torch.cat(self._texts)
        weight = next(model.parameters())
        protocol = {
            **describe,
            "block_size": self._length,
            "blocks": self._blocks,
            "tokens": self._tokens,
            "positions": len(offsets),
            **settings,
            "data_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "versions": _versions(weight.device),
        }
        return TextScores(offsets, terms, block, text.to(torch.int32), protocol, names)


def _sums_by(group: Tensor, terms: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums of `terms` ``[groups, C]`` and counts ``[groups]``, both float64."""
    sums = torch.zeros(groups, terms.shape[1], dtype=terms.dtype).index_add_(0, group, terms)
    return sums, torch.bincount(group, minlength=groups).to(terms.dtype)


def _batches(blocks: Iterable[Block], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stacked input ids and labels ``[<= batch_size, T]``; a change of length ends a batch."""
    pending: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        fields = block if isinstance(block, Mapping) else {"input_ids": block}
        input_ids = torch.as_tensor(fields["input_ids"], dtype=torch.int64)
        labels = torch.as_tensor(fields.get("labels", input_ids), dtype=torch.int64)
        if pending and (len(pending) == batch_size or len(pending[0][0]) != len(input_ids)):
            yield _stack(pending)
            pending = []
        pending.append((input_ids, labels))
    if pending:
        yield _stack(pending)


def _stack(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    input_ids, labels = zip(*pairs, strict=True)
    return torch.stack(input_ids), torch.stack(labels)


def _position_rule(size: int) -> str:
    """Which n-grams are scored, for the protocol."""
    if size == 1:
        return "every predicted token but the last 4"
    if size < 4:
        return f"every predicted chunk of {size} tokens but the last {math.ceil(4 / size)}"
    return f"the first 4 tokens of every predicted chunk of {size}"


def _versions(device: torch.device) -> dict[str, str]:
    names = ("calm-lm", "torch", "transformers")
    return {
        "python": platform.python_version(),
        **{name: installed_version(name) or "not installed" for name in names},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
