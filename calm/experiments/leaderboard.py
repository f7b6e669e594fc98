"""Several models on one text, at the positions that all of them score: who is ahead, who ties."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calm.evaluation.bootstrap import ORDERS, bootstrap_interval, brier_lm, corpus_means
from calm.evaluation.paired import (
    METRICS,
    PairedDifference,
    common_positions,
    paired_difference,
)
from calm.evaluation.protocol import zero_note
from calm.evaluation.scores import TextScores

__all__ = ["Entry", "Leaderboard", "Row", "rank"]


@dataclass(frozen=True)
class Entry:
    """A model that takes part.

    Attributes:
        name: as the user named it.
        kind: ``energy``, ``diffusion``, ``flow`` or ``baseline``.
        patch_size: K.
        parameters: of the language model, without a frozen autoencoder.
        training_tokens: tokens read in training; None if nobody has recorded them.
        scores: of the whole text.
    """

    name: str
    kind: str
    patch_size: int
    parameters: int
    training_tokens: int | None
    scores: TextScores


@dataclass(frozen=True)
class Row:
    """A model's place.

    Attributes:
        rank: from 1; `entry.name` and the rest as in `Entry`.
        values: Brier-1 to Brier-4 (fractions) and BrierLM (0 to 100).
        intervals: their 95 % intervals.
        to_first: scores minus those of the first model, at the same positions; None for the first.
        is_tied: whether the interval of the difference in the deciding metric holds 0.
    """

    rank: int
    name: str
    kind: str
    patch_size: int
    parameters: int
    training_tokens: int | None
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    to_first: PairedDifference | None
    is_tied: bool


@dataclass(frozen=True)
class Leaderboard:
    """Models from the best to the worst.

    Attributes:
        rows: one a model.
        decided_by: ``brier_lm``, or ``brier1`` if BrierLM is 0 for every model.
        groups: spans of text that intervals are taken over.
        protocols: of each model, in the order of `rows`.
    """

    rows: list[Row]
    decided_by: str
    groups: int
    protocols: list[dict[str, Any]]

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_table(self) -> str:
        """The record as a table for people; Brier-n in percent."""
        decided_by = "BrierLM" if self.decided_by == "brier_lm" else "Brier-1 (%)"
        width = max(5, *(len(row.name) for row in self.rows))
        lines = [
            f"rank  {'model':{width}}  {'kind':9}  {'K':>2} {'params':>8} {'tokens':>8}  "
            f"{'BrierLM':>7} {'95 % interval':>15}  {'Brier-1':>7} {'-2':>6} {'-3':>6} {'-4':>6}  "
            f"{decided_by} to the first"
        ]
        for row in self.rows:
            low, high = row.intervals["brier_lm"]
            first, *rest = (100 * row.values[order] for order in ORDERS)
            lines.append(
                f"{row.rank:4}  {row.name:{width}}  {row.kind:9}  {row.patch_size:2} "
                f"{short(row.parameters):>8} {short(row.training_tokens):>8}  "
                f"{row.values['brier_lm']:7.2f} {low:7.2f} {high:7.2f}  {first:7.2f} "
                + " ".join(f"{value:6.2f}" for value in rest)
                + f"  {self._difference(row)}"
            )
        shared = self.protocols[0]
        lines += [
            "",
            f"{shared['positions']} positions that all share, of {shared['tokens']} tokens; "
            f"intervals over the same {self.groups} spans of {shared['block_size']} tokens.",
        ]
        notes = [zero_note(row.values["brier_lm"], row.intervals["brier_lm"]) for row in self.rows]
        lines += [note for note in dict.fromkeys(notes) if note]
        return "\n".join(lines)

    def _difference(self, row: Row) -> str:
        if row.to_first is None:
            return ""
        factor = 1.0 if self.decided_by == "brier_lm" else 100.0
        low, high = row.to_first.interval[self.decided_by]
        value = row.to_first.difference[self.decided_by]
        text = f"{factor * value:+.2f} [{factor * low:+.2f}, {factor * high:+.2f}]"
        return text + (" tied" if row.is_tied else "")


def rank(entries: Sequence[Entry], *, seed: int = 0) -> Leaderboard:
    """Compare `entries` at the positions they share, in spans of a block of text.

    The order is that of BrierLM, and of Brier-1 where BrierLM is equal, as it is for models that
    score 0.

    Raises:
        UserError: no shared position, or different texts or protocols.
    """
    common = common_positions([entry.scores for entry in entries])
    span = common[0].protocol["block_size"]
    grouped = [scores.grouped(span) for scores in common]
    counts = grouped[0][1]
    values = []
    for sums, _ in grouped:
        means = corpus_means(sums, counts)
        values.append([*means.tolist(), float(brier_lm(means))])
    order = sorted(range(len(entries)), key=lambda index: (-values[index][4], -values[index][0]))
    decided_by = "brier_lm" if values[order[0]][4] > 0 else "brier1"
    rows = []
    for place, index in enumerate(order, 1):
        entry, sums = entries[index], grouped[index][0]
        ends = bootstrap_interval(sums, counts, seed=seed).T.tolist()
        to_first = None
        if place > 1:
            to_first = paired_difference(sums, counts, grouped[order[0]][0], seed=seed)
        rows.append(
            Row(
                rank=place,
                name=entry.name,
                kind=entry.kind,
                patch_size=entry.patch_size,
                parameters=entry.parameters,
                training_tokens=entry.training_tokens,
                values=dict(zip(METRICS, values[index], strict=True)),
                intervals={
                    name: (low, high) for name, (low, high) in zip(METRICS, ends, strict=True)
                },
                to_first=to_first,
                is_tied=to_first is not None and to_first.is_tied(decided_by),
            )
        )
    return Leaderboard(rows, decided_by, len(counts), [common[index].protocol for index in order])


def short(number: int | None) -> str:
    """``1.24M``; a dash for None."""
    if number is None:
        return "-"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
