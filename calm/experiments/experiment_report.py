"""The page that an experiment ends with: what was run, a table, the verdicts on claims."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from calm.errors import UserError
from calm.experiments.experiment import Experiment, Finding, Result, Verdict
from calm.experiments.experiment_plot import plot_experiment
from calm.experiments.naming import number, shown, title
from calm.experiments.runner import RESULTS, Record
from calm.experiments.scales import Scale
from calm.experiments.verdicts import by_cell, judge

__all__ = ["claim_rows", "results_table", "to_report", "write_index", "write_report"]

EVIDENCE = "how much better, with 95 % interval"
HOW = (
    "Bars and ± are 95 % intervals. Those of one seed are of the text alone: training again with "
    "another seed may move a result by more. Differences are taken at the same places of the text, "
    "so that their intervals are narrower than those of the two models."
)
ON_TEST = ("test/brier_lm", "test/brier1")  # shown where models were scored on that text
COSTS = ("parameters", "training_tokens", "training_flops", "seconds")
SHORT = 120.0  # seconds; longer times are in minutes


def write_report(experiment: Experiment, scale: Scale, record: Record, folder: Path) -> str:
    """Write ``report.md`` and ``report.png``; returns the page."""
    page = to_report(experiment, scale, record)
    (folder / "report.md").write_text(page, encoding="utf-8")
    results = record.current(experiment, scale)
    plot_experiment(experiment.panels(scale), results, folder / "report.png")
    return page


def write_index(experiments: Sequence[Experiment], scale: Scale, root: Path) -> None:
    """Write ``README.md`` in `root`: every experiment that has results there, and every claim."""
    links, rows = [], []
    for experiment in experiments:
        path = root / experiment.name / RESULTS
        if not path.is_file():
            continue
        links.append(f"- [{experiment.name}]({experiment.name}/report.md): {experiment.question}")
        results = Record.read(path).current(experiment, scale)
        rows += [(experiment.name, *row) for row in claim_rows(experiment, scale, results)]
    parts = [
        "# Experiments",
        f"Scale `{scale.name}`: {scale.about}. {HOW} `calm.experiments.verdicts` says how claims "
        "are judged.",
        scale.caution,
        "\n".join(links),
        summary([row[3] for row in rows]),
        _table(("experiment", "source", "claim", "here", EVIDENCE), rows) if rows else "",
    ]
    (root / "README.md").write_text(_page(parts), encoding="utf-8")


def to_report(experiment: Experiment, scale: Scale, record: Record) -> str:
    """The page in Markdown; the figure is ``report.png`` beside it."""
    results = record.current(experiment, scale)
    rows = claim_rows(experiment, scale, results)
    parts = [
        f"# {experiment.name}",
        experiment.question,
        summary([row[2] for row in rows]),
        scale.caution,
        _table(("source", "claim", "here", EVIDENCE), rows) if rows else "",
        "![](report.png)",
        results_table(experiment, results),
        HOW,
        experiment.analysis(results) if experiment.analysis and results else "",
        "## What was run",
        f"`calm experiment {experiment.name} --scale {scale.name}` ({scale.about}): "
        + _what_ran(scale, record, results),
        experiment.notes,
    ]
    return _page(parts)


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many claims agree, disagree and cannot be told, in a sentence; empty without claims."""
    if not verdicts:
        return ""
    counts = Counter(verdicts)
    agree, disagree, untold = (counts[verdict] for verdict in Verdict)
    return (
        f"Of {len(verdicts)} claim{'s' * (len(verdicts) > 1)}, {agree} "
        f"agree{'s' * (agree == 1)} with what is measured here, {disagree} "
        f"disagree{'s' * (disagree == 1)}, {untold} cannot be told."
    )


def results_table(experiment: Experiment, results: Sequence[Result]) -> str:
    """A row for each cell; several seeds are averaged, their range stands behind the mean."""
    labels = list(dict.fromkeys(name for result in results for name in result.labels))
    columns = [*experiment.columns, *(name for name in ON_TEST if name not in experiment.columns)]
    columns = [name for name in columns if any(name in result.values for result in results)]
    rows = [
        [
            *(_label(cell[0].labels.get(name, "")) for name in labels),
            *(_values(name, cell) for name in columns),
        ]
        for cell in by_cell(results)
    ]
    return _table([*labels, *map(title, columns)], rows)


def claim_rows(experiment: Experiment, scale: Scale, results: Sequence[Result]) -> list[Finding]:
    """Every claim whose cells have results, with its verdict."""
    rows = []
    for claim in experiment.claims(scale):
        has_results = [
            any(result.matches(labels) for result in results)
            for labels in (claim.better, claim.worse)
        ]
        if not all(has_results):
            continue
        try:
            verdict, found = judge(claim, results)
        except UserError as error:  # other results can still be judged
            rows.append(Finding(claim.source, claim.text, Verdict.UNTOLD, str(error)))
            continue
        seeds = found[0].seeds
        evidence = "; ".join(map(str, found)) + f" ({seeds} seed{'s' * (seeds > 1)})"
        rows.append(Finding(claim.source, claim.text, verdict, evidence))
    return rows + (experiment.findings(results) if results else [])


def _what_ran(scale: Scale, record: Record, results: Sequence[Result]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    texts = ", ".join(f"{name} ({text})" for name, text in record.configuration["texts"].items())
    seeds = ", ".join(map(str, sorted({result.seed for result in results})))
    seconds = sum(result.values.get("seconds", 0.0) for result in results)
    took = f"{seconds:.0f} s" if seconds < SHORT else f"{seconds / 60:.0f} minutes"
    costs = "; ".join(f"{title(name)} {_range(name, results)}" for name in COSTS)
    lines = [
        f"{len(results)} models measured in {took}, seeds {seeds}; scored on {texts}, at most "
        f"{scale.blocks} blocks, {scale.draws} draws a chunk; {machine}.",
        f"Of each: {costs}. FLOPs are those of the language model's training, without that of its "
        "autoencoder; seconds are wall time, with whatever else the machine did, and include "
        "measuring, and training of what the model needs.",
    ]
    if left := len(record.results) - len(results):
        lines.append(f"{left} results of cells that this grid no longer has are not shown.")
    return " ".join(lines)


def _range(name: str, results: Sequence[Result]) -> str:
    values = [result.values[name] for result in results if name in result.values]
    if not values:
        return "unknown"
    ends = dict.fromkeys((number(min(values)), number(max(values))))
    return " to ".join(ends)


def _values(name: str, cell: Sequence[Result]) -> str:
    """Mean over seeds, and their range where there are several."""
    found = [float(each.values[name]) for each in cell if each.values.get(name) is not None]
    if not found:
        return ""
    mean, low, high = (
        shown(name, value) for value in (sum(found) / len(found), min(found), max(found))
    )
    return mean if low == high else f"{mean} [{low}, {high}]"


def _label(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
