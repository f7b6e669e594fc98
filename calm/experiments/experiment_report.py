"""The page that an experiment ends with: what was run, a table, the verdicts on claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm.experiments.experiment import Experiment, Result
from calm.experiments.experiment_plot import plot_experiment
from calm.experiments.runner import RESULTS, Record
from calm.experiments.scales import Scale
from calm.experiments.verdicts import Verdict, judge

__all__ = ["claim_rows", "results_table", "to_report", "write_index", "write_report"]

PERCENT = ("brier1", "brier2", "brier3", "brier4")


def write_report(experiment: Experiment, scale: Scale, record: Record, folder: Path) -> str:
    """Write ``report.md`` and ``report.png``; returns the page."""
    plot_experiment(experiment.panels(scale), record.results, folder / "report.png")
    page = to_report(experiment, scale, record)
    (folder / "report.md").write_text(page, encoding="utf-8")
    return page


def write_index(experiments: Sequence[Experiment], scale: Scale, root: Path) -> None:
    """Write ``README.md`` in `root`: every experiment that has results there, and every claim."""
    lines = [
        "# Experiments",
        f"Scale `{scale.name}`: {scale.about}. A claim is judged on paired differences; "
        "`calm.experiments.verdicts` says how.",
    ]
    rows = ["| experiment | source | claim | here | difference, better minus worse |",
            "|---|---|---|---|---|"]  # fmt: skip
    for experiment in experiments:
        path = root / experiment.name / RESULTS
        if not path.is_file():
            continue
        lines.append(f"- [{experiment.name}]({experiment.name}/report.md): {experiment.question}")
        results = Record.read(path).results
        rows += [
            f"| {experiment.name} | {' | '.join(row)} |"
            for row in claim_rows(experiment, scale, results)
        ]
    page = "\n\n".join([*lines[:2], "\n".join(lines[2:]), "\n".join(rows)])
    (root / "README.md").write_text(page + "\n", encoding="utf-8")


def to_report(experiment: Experiment, scale: Scale, record: Record) -> str:
    """The page in Markdown; the figure is ``report.png`` beside it."""
    parts = [
        f"# {experiment.name}",
        experiment.question,
        f"`calm experiment {experiment.name} --scale {scale.name}` ({scale.about}): "
        + _what_ran(scale, record),
        results_table(experiment, record.results),
        "![](report.png)",
        _verdicts(experiment, scale, record.results),
    ]
    if experiment.analysis:
        parts.append(experiment.analysis(record.results))
    return "\n\n".join(part for part in parts if part) + "\n"


def results_table(experiment: Experiment, results: Sequence[Result]) -> str:
    """A row for each cell; several seeds are averaged, their range stands behind BrierLM."""
    labels = list(dict.fromkeys(name for result in results for name in result.labels))
    lines = [
        "| " + " | ".join([*labels, *map(_title, experiment.columns)]) + " |",
        "|" + "---|" * (len(labels) + len(experiment.columns)),
    ]
    for group in _by_cell(results):
        cells = [_label(group[0].labels.get(name, "")) for name in labels]
        cells += [_value(name, [result.values for result in group]) for name in experiment.columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim_rows(
    experiment: Experiment, scale: Scale, results: Sequence[Result]
) -> list[tuple[str, str, Verdict, str]]:
    """Source, claim, verdict and evidence of every claim whose cells have results."""
    rows = []
    for claim in experiment.claims(scale):
        has_results = [
            any(result.matches(labels) for result in results)
            for labels in (claim.better, claim.worse)
        ]
        if not all(has_results):
            continue
        verdict, found = judge(claim, results)
        seeds = found[0].seeds
        evidence = "; ".join(map(str, found)) + f" ({seeds} seed{'s' * (seeds > 1)})"
        rows.append((claim.source, claim.text, verdict, evidence))
    return rows


def _verdicts(experiment: Experiment, scale: Scale, results: Sequence[Result]) -> str:
    rows = claim_rows(experiment, scale, results)
    if not rows:
        return ""
    lines = ["| source | claim | here | difference, better minus worse |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _what_ran(scale: Scale, record: Record) -> str:
    seconds = sum(result.values.get("seconds", 0.0) for result in record.results)
    machine = ", ".join(f"{name} {value}" for name, value in record.machine.items())
    texts = ", ".join(f"{name} ({text})" for name, text in record.configuration["texts"].items())
    return (
        f"{len(record.results)} cells, {seconds / 60:.0f} minutes; seeds "
        f"{', '.join(map(str, scale.seeds))}; scored on {texts}, at most {scale.blocks} blocks, "
        f"{scale.draws} draws a chunk; {machine}."
    )


def _by_cell(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(str(sorted(result.labels.items(), key=str)), []).append(result)
    return list(groups.values())


def _title(name: str) -> str:
    text, _, metric = name.rpartition("/")
    shown = metric.replace("_", " ").replace("brier lm", "BrierLM")
    shown = f"{shown}, %" if metric in PERCENT else shown
    return f"{shown} ({text})" if text else shown


def _value(name: str, values: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds, and their range where there are several."""
    found = [float(each[name]) for each in values if each.get(name) is not None]
    if not found:
        return ""
    scale = 100.0 if name.rpartition("/")[2] in PERCENT else 1.0
    mean, low, high = (scale * each for each in (sum(found) / len(found), min(found), max(found)))
    if len(found) == 1 or low == high:
        return _number(mean)
    return f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _label(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10000 else f"{value:.2e}"
