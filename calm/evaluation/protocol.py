"""BrierLM of a corpus, with everything that is needed to compute the same number again.

BrierLM changes by about 30 % with the block size alone, so `Evaluation` holds the protocol beside
the number.
"""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calm.environment import installed_version
from calm.errors import UserError
from calm.evaluation.bootstrap import bootstrap_interval, brier_lm, corpus_means, standard_errors
from calm.evaluation.brier import brier_sums, evaluating
from calm.evaluation.samplers import make_sampler
from calm_kernels.noise import as_seed

__all__ = ["Evaluation", "evaluate"]

Block = Mapping[str, Any] | Sequence[int] | Tensor
ORDERS = ("brier1", "brier2", "brier3", "brier4")


@dataclass(frozen=True)
class Evaluation:
    """BrierLM of a corpus.

    Attributes:
        brier_lm: 0 to 100; 0 when any Brier-n is not positive.
        brier_lm_interval: 95 % bootstrap interval over blocks; None with a single block.
        brier: Brier-1 to Brier-4 as fractions.
        brier_intervals: their intervals.
        standard_errors: their standard errors between blocks; None with a single block.
        protocol: settings, data hash, model and versions.
    """

    brier_lm: float
    brier_lm_interval: tuple[float, float] | None
    brier: dict[str, float]
    brier_intervals: dict[str, tuple[float, float]] | None
    standard_errors: dict[str, float] | None
    protocol: dict[str, Any]

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """The record as a table for people; Brier-n in percent."""
        rows = [f"{'':12} {'value':>7}   {'95 % interval':>15}   {'SE':>5}"]
        for order in ORDERS:
            rows.append(
                f"{'Brier-' + order[-1] + ' (%)':12} {100 * self.brier[order]:7.2f}   "
                + _interval((self.brier_intervals or {}).get(order), 100.0)
                + (f"   {100 * self.standard_errors[order]:5.2f}" if self.standard_errors else "")
            )
        rows.append(f"{'BrierLM':12} {self.brier_lm:7.2f}   {_interval(self.brier_lm_interval)}")
        rows.append("")
        rows += [f"{key:14} {_line(value)}" for key, value in self.protocol.items()]
        return "\n".join(rows)


def evaluate(
    model: PreTrainedModel,
    blocks: Iterable[Block],
    *,
    num_samples: int = 8,
    brier_draws: int | None = None,
    noise_scale: float = 1.0,
    skip_repeats: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    max_blocks: int | None = None,
    progress: Callable[[Iterator[Any]], Iterable[Any]] = iter,
    describe: Mapping[str, Any] | None = None,
) -> Evaluation:
    """BrierLM of `model` over `blocks`, with errors and the protocol.

    Args:
        model: a CALM or the token baseline; runs where its parameters are.
        blocks: token sequences of one length: token ids, or mappings with ``input_ids`` and
            optionally ``labels`` (negative where a position does not count).
        num_samples: N, draws of each chunk.
        brier_draws: None uses all of them, 2 is the published estimator.
        noise_scale: factor on the head's noise.
        skip_repeats: skip n-grams of one repeated token.
        seed: of the draws and of the bootstrap.
        batch_size: blocks in one forward pass; does not change the result.
        max_blocks: stop after this many blocks.
        progress: wraps the iterator over batches, for a progress bar.
        describe: what else to record in the protocol (model and data as the user named them).

    Returns: the `Evaluation`.
    Raises:
        UserError: no blocks, blocks of different lengths, no position to score, bad arguments.
    """
    device = next(model.parameters()).device
    sampler = make_sampler(
        model,
        num_samples=num_samples,
        brier_draws=brier_draws,
        noise_scale=noise_scale,
        seed=as_seed(seed, device),
    )
    digest = hashlib.sha256()
    parts, length, first_row, tokens = [], 0, 0, 0
    with evaluating(model):
        for input_ids, labels in progress(_batches(islice(blocks, max_blocks), batch_size)):
            text = labels[labels >= 0]  # the same with start chunks or without
            digest.update(text.numpy().tobytes())
            tokens += len(text)
            length = length or input_ids.shape[1]
            if input_ids.shape[1] != length:
                raise UserError(
                    f"blocks must have one length; got {length} and {input_ids.shape[1]} tokens"
                )
            scored = brier_sums(
                sampler,
                input_ids.to(device),
                labels.to(device),
                skip_repeats=skip_repeats,
                first_row=first_row,
            )
            parts.append([part.cpu() for part in scored])
            first_row += input_ids.numel() // sampler.predictor.patch_size
    if not parts:
        raise UserError("there are no blocks to evaluate; use more text or a smaller block size")
    sums, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    protocol = {
        **(describe or {}),
        "block_size": length,
        "blocks": len(counts),
        "tokens": tokens,
        "positions": int(counts.sum()),
        "positions_are": _position_rule(sampler.predictor.patch_size),
        "start_chunks": sampler.predictor.start_token_id is not None,
        "estimator": sampler.estimator,
        "skip_repeats": skip_repeats,
        "num_samples": num_samples,
        "brier_draws": "all" if brier_draws is None else brier_draws,
        "noise_scale": noise_scale,
        "seed": seed,
        "data_sha256": digest.hexdigest(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": _versions(device),
    }
    return _summarise(sums, counts, seed, protocol)


def _summarise(sums: Tensor, counts: Tensor, seed: int, protocol: dict[str, Any]) -> Evaluation:
    """Means, errors and intervals; blocks without a position are dropped."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        raise UserError("no position is left to score: every n-gram has padding or is skipped")
    means = corpus_means(sums, counts)
    errors = standard_errors(sums, counts).tolist()
    ends = bootstrap_interval(sums, counts, seed=seed).T.tolist()  # five pairs
    is_single = math.isnan(errors[0])
    return Evaluation(
        brier_lm=float(brier_lm(means)),
        brier_lm_interval=None if is_single else (ends[4][0], ends[4][1]),
        brier=dict(zip(ORDERS, means.tolist(), strict=True)),
        brier_intervals=None
        if is_single
        else {order: (low, high) for order, (low, high) in zip(ORDERS, ends[:4], strict=True)},
        standard_errors=None if is_single else dict(zip(ORDERS, errors, strict=True)),
        protocol=protocol,
    )


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


def _interval(ends: tuple[float, float] | None, scale: float = 1.0) -> str:
    if ends is None:
        return f"{'one block only':>15}"
    return f"{scale * ends[0]:7.2f} {scale * ends[1]:7.2f}"


def _line(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
