"""What an experiment is: cells, each a model to train and what to measure of it; claims; a figure.

An experiment is a declaration. `calm.experiments.runner` trains, measures and resumes,
`calm.experiments.verdicts` judges claims, `calm.experiments.experiment_report` writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from calm.experiments.scales import Scale
from calm.experiments.trained import Training, digest

__all__ = [
    "BRIER_COLUMNS",
    "Cell",
    "Claim",
    "Experiment",
    "Finding",
    "Panel",
    "Result",
    "Verdict",
]

BRIER_COLUMNS = tuple(
    f"held-out/{name}" for name in ("brier_lm", "brier1", "brier2", "brier3", "brier4")
)


@dataclass(frozen=True, eq=False)
class Cell:
    """A model, and what is measured of it.

    Attributes:
        labels: its place in the grid, as columns of the table: ``{"N": 8, "exponent": 1.0}``.
        training: the model.
        measure: name of a function in `calm.experiments.measures`.
        options: keywords of it, as JSON has them.
        seed: of this repetition; the labels of repetitions are equal.
    """

    labels: Mapping[str, Any]
    training: Training
    measure: str = "language_model"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides the result, but for the text."""
        labels = dict(self.labels)
        return digest([labels, self.training.key, self.measure, dict(self.options), self.seed])

    @property
    def name(self) -> str:
        """For progress and errors."""
        return ", ".join(f"{label} {value}" for label, value in self.labels.items())


@dataclass(frozen=True)
class Result:
    """What was measured of a cell, as ``results.json`` has it.

    Attributes:
        key: of the cell.
        labels: of the cell.
        seed: of the cell.
        values: numbers by name; of a text as ``held-out/brier1``.
        groups: sums and counts of stretches of each text, to compare cells pairwise: by
            ``held-out/brier``, rows ``[sum, ..., count]``.
        curve: of the training log (``step``, ``loss``), or what a measure gives.
    """

    key: str
    labels: dict[str, Any]
    seed: int
    values: dict[str, Any]
    groups: dict[str, list[list[float]]] = field(default_factory=dict, repr=False)
    curve: list[dict[str, float]] = field(default_factory=list, repr=False)

    def matches(self, labels: Mapping[str, Any]) -> bool:
        """Whether it has these labels, among others."""
        return all(self.labels.get(name) == value for name, value in labels.items())


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (or of others) that one cell is better than another.

    Attributes:
        source: where it stands, as in ``table 3``.
        text: what it says, in a sentence.
        better: labels of the cells that it calls better.
        worse: labels of the others.
        metrics: measures that decide, each with a higher-is-better sign; see
            `calm.experiments.verdicts`.
        corpus: text that they are measured on.
    """

    source: str
    text: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    metrics: Sequence[str] = ("brier1", "brier2")
    corpus: str = "held-out"


class Verdict(StrEnum):
    """What results say of a claim."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    UNTOLD = "cannot be told"


class Finding(NamedTuple):
    """A claim with its verdict: a row of reports.

    Attributes:
        source: where the claim stands.
        text: what it says.
        verdict: on it.
        evidence: numbers that the verdict rests on.
    """

    source: str
    text: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Panel:
    """One panel of the figure.

    Attributes:
        title: above it.
        x: label or value along the horizontal axis.
        y: value along the vertical one.
        line: label whose values are lines of their own; None for one line.
        where: labels of the cells that it shows, any of these; all cells by default.
        log_x: logarithmic axis.
        note: below the title.
        is_frontier: whether a line passes the best cell at each place alone.
        is_curve: whether `x` and `y` are names of a result's curve.
    """

    title: str
    x: str
    y: str
    line: str | None = None
    where: Sequence[Mapping[str, Any]] = ({},)
    log_x: bool = False
    note: str = ""
    is_frontier: bool = False
    is_curve: bool = False

    def shows(self, result: Result) -> bool:
        """Whether `result` is of one of its cells."""
        return any(result.matches(labels) for labels in self.where)


@dataclass(frozen=True)
class Experiment:
    """A question, the grid that answers it, and how the answer is shown.

    Attributes:
        name: of the subcommand.
        question: in one sentence.
        cells: of a scale, for one seed.
        columns: values that the table shows, beside labels.
        panels: of the figure, given the scale.
        claims: what is judged, given the scale.
        findings: claims about more than two cells, judged from all results.
        analysis: further Markdown from all results (a fit, a correlation).
        notes: how it differs from the paper's, and what to keep in mind, for the page.
        texts: corpora to score on, by name, beside what training holds out.
    """

    name: str
    question: str
    cells: Callable[[Scale, int], list[Cell]]
    columns: Sequence[str]
    panels: Callable[[Scale], Sequence[Panel]]
    claims: Callable[[Scale], list[Claim]] = lambda scale: []
    findings: Callable[[Sequence[Result]], list[Finding]] = lambda results: []
    analysis: Callable[[Sequence[Result]], str] | None = None
    notes: str = ""
    texts: Mapping[str, str] = field(default_factory=dict)
