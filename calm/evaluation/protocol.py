"""BrierLM of a corpus, with everything that is needed to compute the same number again.

BrierLM changes by about 30 % with the block size alone, so `Evaluation` holds the protocol beside
the number.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from calm.errors import UserError
from calm.evaluation.bootstrap import (
    ORDERS,
    bootstrap_interval,
    brier_lm,
    corpus_means,
    standard_errors,
)
from calm.evaluation.scores import Block, TextScores, score_text

__all__ = ["Evaluation", "evaluate", "summarise", "zero_note"]


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
        if note := zero_note(self.brier_lm, self.brier_lm_interval):
            rows.append(note)
        rows.append("")
        width = max(map(len, self.protocol), default=0)
        rows += [f"{key:{width}} {_line(value)}" for key, value in self.protocol.items()]
        return "\n".join(rows)


def zero_note(value: float, interval: tuple[float, float] | None) -> str:
    """Why BrierLM or an end of its interval is 0, in one line; empty where neither is."""
    if value > 0 and (interval is None or interval[0] > 0):
        return ""
    return (
        "BrierLM is 0 wherever one of Brier-1 to Brier-4 is not positive, most often Brier-4 of a "
        "small model: tell such models apart by Brier-1 and Brier-2."
    )


def evaluate(model: PreTrainedModel, blocks: Iterable[Block], **settings: Any) -> Evaluation:
    """BrierLM of `model` over `blocks`, with errors and the protocol.

    Args:
        model: a CALM or the token baseline.
        blocks: token sequences of one length.
        settings: of `calm.evaluation.scores.score_text`, which describes all arguments.

    Returns: the `Evaluation`.
    Raises:
        UserError: no blocks, blocks of different lengths, no position to score, bad arguments.
    """
    return summarise(score_text(model, blocks, **settings))


def summarise(scores: TextScores) -> Evaluation:
    """Means, errors and intervals between blocks; blocks without a position are dropped."""
    sums, counts = scores.sums()
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        raise UserError("no position is left to score: every n-gram has padding or is skipped")
    means = corpus_means(sums, counts)
    errors = standard_errors(sums, counts).tolist()
    ends = bootstrap_interval(sums, counts, seed=scores.protocol["seed"]).T.tolist()  # five pairs
    is_single = math.isnan(errors[0])
    return Evaluation(
        brier_lm=float(brier_lm(means)),
        brier_lm_interval=None if is_single else (ends[4][0], ends[4][1]),
        brier=dict(zip(ORDERS, means.tolist(), strict=True)),
        brier_intervals=None
        if is_single
        else {order: (low, high) for order, (low, high) in zip(ORDERS, ends[:4], strict=True)},
        standard_errors=None if is_single else dict(zip(ORDERS, errors, strict=True)),
        protocol=scores.protocol,
    )


def _interval(ends: tuple[float, float] | None, scale: float = 1.0) -> str:
    if ends is None:
        return f"{'one block only':>15}"
    return f"{scale * ends[0]:7.2f} {scale * ends[1]:7.2f}"


def _line(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
