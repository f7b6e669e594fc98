"""Results of the demo: as data, as a Markdown page, as text for the terminal."""

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from calm.evaluation import Evaluation
from calm.experiments.demo_gap import DemoGap
from calm.experiments.demo_health import DemoHealth
from calm.experiments.demo_stages import StageRun

__all__ = [
    "ORDERS",
    "DemoResults",
    "LanguageModelResults",
    "Sample",
    "temperature_name",
    "to_console",
    "to_markdown",
]

ORDERS = (1, 2, 3, 4)
WIDTH = 96  # of sample texts


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    temperature: float
    prompt: str
    continuation: str


@dataclass(frozen=True)
class LanguageModelResults:
    """One language model.

    Attributes:
        name: in tables and figures.
        folder: of its checkpoint.
        run: its training.
        evaluation: BrierLM on held-out documents.
        samples: texts.
        tokens_per_second: generation speed by temperature, as in ``"1/3"``.
    """

    name: str
    folder: str
    run: StageRun
    evaluation: Evaluation
    samples: list[Sample]
    tokens_per_second: dict[str, float]


@dataclass(frozen=True)
class DemoResults:
    """Everything that the demo measured.

    Attributes:
        text: what the models learned from.
        machine: processor, threads, version of torch.
        seconds: wall time of everything, imports excluded.
        peak_memory_bytes: of the process.
        accuracy: share of held-out tokens that the autoencoder reconstructs from a drawn latent.
        autoencoder: its training.
        calm: the continuous language model.
        readout: the same model where its readout draws; None without one.
        baseline: the token-by-token baseline.
        gap: where BrierLM of the former is lost.
        health: of the continuous language model.
        commands: of the shell, to try next.
    """

    text: str
    machine: str
    seconds: float
    peak_memory_bytes: int
    accuracy: float
    autoencoder: StageRun
    calm: LanguageModelResults
    readout: LanguageModelResults | None
    baseline: LanguageModelResults
    gap: DemoGap
    health: DemoHealth
    commands: list[str]

    @property
    def models(self) -> list[LanguageModelResults]:
        """All that were scored."""
        return [model for model in (self.calm, self.readout, self.baseline) if model]


def temperature_name(temperature: float) -> str:
    """``1`` or ``1/3``."""
    number = round(1 / temperature)
    return "1" if number == 1 else f"1/{number}"


def to_console(results: DemoResults) -> str:
    """The numbers and all samples as plain text."""
    table = [" ".join(parts) for parts in _aligned(_comparison(results))]
    samples = []
    for heading, texts in _samples(results):
        samples += ["", heading, *(textwrap.indent(text, "  ") for text in texts)]
    return "\n".join(
        [
            "",
            f"reconstruction of held-out text  {100 * results.accuracy:.2f} %",
            "",
            *table,
            "",
            *_gap(results.gap),
            "",
            "health of the CALM",
            results.health.table,
            *results.health.advice,
            *samples,
            "",
            f"{results.seconds:.0f} s in total, "
            f"peak memory {results.peak_memory_bytes / 2**30:.2f} GiB",
        ]
    )


def to_markdown(results: DemoResults) -> str:
    """The report as a Markdown page."""
    ae = results.autoencoder
    rows = _comparison(results)
    table = ["| " + " | ".join(parts) + " |" for parts in _aligned(rows)]
    rule = "|" + "|".join("-" * (len(part) + 2) for part in _aligned(rows)[0]) + "|"
    protocol = results.calm.evaluation.protocol
    parts = [
        "# A CALM from nothing",
        f"Text: {results.text}. Machine: {results.machine}. {results.seconds:.0f} s in total, peak "
        f"memory {results.peak_memory_bytes / 2**30:.2f} GiB.",
        "![curves](curves.png)",
        "## Autoencoder",
        f"{100 * results.accuracy:.3f} % of held-out tokens are reconstructed from a drawn latent; "
        f"{ae.parameters:,} parameters, {ae.steps:,} steps, {ae.seconds:.0f} s.",
        "## Language models",
        "\n".join([table[0], rule, *table[1:]]),
        f"Held-out documents: {protocol['blocks']} blocks of {protocol['block_size']} tokens, "
        f"{protocol['num_samples']} draws a position, runs of one repeated token skipped, 95 % "
        "bootstrap intervals over blocks. CALM is scored at the starts of chunks"
        + (", the first of a document among them" if protocol["start_chunks"] else "")
        + ", the baseline at every token. Brier-n is 2 P(y) - sum P(x)^2 of the next n tokens: "
        "100 if the model is certain and right, 0 if its probability is spread over everything, "
        "below 0 if it is certain and wrong.",
        "## Where BrierLM is lost",
        "\n".join(f"- {line}" for line in _gap(results.gap)),
        "A readout is a small network trained on CALM's hidden states to draw a chunk token by "
        "token. `docs/gap.md` explains the three numbers; `calm experiment gap` measures more of "
        "them, and longer.",
        "## Health of the CALM",
        f"~~~text\n{results.health.table}\n~~~",
        "\n".join(f"- {line}" for line in results.health.advice) or "No value is amiss.",
        "## Samples",
    ]
    for heading, texts in _samples(results):
        parts += [f"{heading}:", "~~~text\n" + "\n".join(texts) + "\n~~~"]
    parts += ["## Next", "~~~sh\n" + "\n".join(results.commands) + "\n~~~"]
    return "\n\n".join(parts) + "\n"


def _comparison(results: DemoResults) -> list[list[str]]:
    """Rows of the table: a header, then the models side by side."""
    models = results.models
    rows = [
        ["", *(model.name for model in models)],
        ["parameters", *(f"{model.run.parameters:,}" for model in models)],
        ["training", *(f"{model.run.seconds:.0f} s" for model in models)],
        ["steps", *(f"{model.run.steps:,}" for model in models)],
        ["tokens read", *(f"{model.run.tokens:,}" for model in models)],
        ["tokens/s, training", *(f"{model.run.tokens_per_second:,.0f}" for model in models)],
    ]
    for order in ORDERS:
        rows.append([f"Brier-{order} (%)", *(_brier(model, order) for model in models)])
    rows.append(["BrierLM", *(_brier_lm(model) for model in models)])
    for name in results.calm.tokens_per_second:
        speeds = (model.tokens_per_second[name] for model in models)
        rows.append([f"tokens/s, T = {name}", *(f"{speed:,.0f}" for speed in speeds)])
    return rows


def _gap(gap: DemoGap) -> list[str]:
    """The losses of BrierLM, a line each; a longer training of the readout moves both bounds."""
    if gap.note:
        return [f"where BrierLM is lost could not be measured: {gap.note}"]
    named = {
        "trunk: from the baseline to a readout of CALM's hidden states: at most": gap.trunk,
        "head: from the readout to CALM's draws: at least": gap.head,
        "dispersion: won back by another noise_spread:": gap.dispersion,
    }
    lines = [f"{name} {_with_interval(ends[0], ends[1:])}" for name, ends in named.items() if ends]
    if gap.head and not gap.head[1] > 0:
        lines.append(
            "the readout has not learned enough to draw better than the head: a longer demo "
            "(--minutes) trains it longer"
        )
    return lines


def _brier(model: LanguageModelResults, order: int) -> str:
    name = f"brier{order}"
    intervals = model.evaluation.brier_intervals
    return _with_interval(
        100 * model.evaluation.brier[name],
        None if intervals is None else tuple(100 * end for end in intervals[name]),
    )


def _brier_lm(model: LanguageModelResults) -> str:
    return _with_interval(model.evaluation.brier_lm, model.evaluation.brier_lm_interval)


def _with_interval(value: float, ends: Iterable[float] | None) -> str:
    return f"{value:.2f}" + ("" if ends is None else " [{:.2f}, {:.2f}]".format(*ends))


def _aligned(rows: list[list[str]]) -> list[list[str]]:
    """Cells padded to the width of their column; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.rjust(width) if index else cell.ljust(width)
         for index, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]  # fmt: skip


def _samples(results: DemoResults) -> Iterator[tuple[str, list[str]]]:
    """A heading (model, temperature) and its texts, wrapped, with prompts in brackets."""
    for model in results.models:
        for temperature in dict.fromkeys(sample.temperature for sample in model.samples):
            texts = [
                textwrap.fill(" ".join(f"[{sample.prompt}]{sample.continuation}".split()), WIDTH)
                for sample in model.samples
                if sample.temperature == temperature
            ]
            yield f"{model.name}, T = {temperature_name(temperature)}", texts
