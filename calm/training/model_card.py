"""The model card: ``README.md`` of a trained model's folder, as the Hugging Face hub shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from calm.integrity import write_atomically
from calm.pretrained import PRETRAINED
from calm.training.flags.recipe import Stage
from calm.training.trainer import CALMTrainer

__all__ = [
    "CARD",
    "TrainedModel",
    "brier_result",
    "markdown_table",
    "model_card",
    "write_model_card",
]

CARD = "README.md"
# First line of the metadata: a person who edits a card takes it out, and the card stays.
MARK = "# written by calm after training; take this line out to keep your changes\n"
ABOUT = {
    Stage.AUTOENCODER: "The autoencoder of a continuous autoregressive language model (CALM): "
    "{patch_size} tokens to one vector and back. A language model is trained on it by `calm "
    "train`.",
    Stage.CALM: "A continuous autoregressive language model (CALM, arXiv 2510.27688): it predicts "
    "{patch_size} tokens with each step of its backbone. The autoencoder is in the file.",
    Stage.BASELINE: "A token-by-token language model, trained as a baseline of CALMs.",
    Stage.TEMPERATURE: "A continuous autoregressive language model (CALM, arXiv 2510.27688), "
    "{patch_size} tokens a step, whose second head has learned low temperatures: "
    '`generate(method="amortized", temperature=...)` takes one draw for each step.',
    Stage.POST: "A continuous autoregressive language model (CALM, arXiv 2510.27688), "
    "{patch_size} tokens a step, whose draws have been trained by a reward after pre-training "
    "(`calm post-train`; `options` in protocol.json say which).",
    Stage.DISTILLATION: "A continuous autoregressive language model (CALM, arXiv 2510.27688), "
    "{patch_size} tokens a step, that has learned from draws of another language model. The "
    "autoencoder is in the file.",
}
USE = """\
```python
from calm import {names}
from transformers import AutoTokenizer

folder = {folder}
model = {model_class}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
GENERATE = """\
ids = tokenizer("Returns the ", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, temperature=0.5)[0]))
"""
LIMITS = (
    "It continues text like that it was trained on, follows no instructions, and states falsehoods."
)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what its run has recorded.

    Attributes:
        name: of the model.
        model: itself.
        protocol: ``protocol.json`` of its run.
        steps: of the optimizer.
    """

    name: str
    model: PreTrainedModel
    protocol: dict[str, Any]
    steps: int

    @property
    def stage(self) -> Stage:
        """What was trained."""
        return Stage(self.protocol["stage"])

    @property
    def text(self) -> str:
        """What it was trained on, in words."""
        files = self.protocol["train_files"] or []
        return self.protocol["dataset"] or ", ".join(files[:3]) + (
            " and more" if len(files) > 3 else ""
        )


def model_card(
    trained: TrainedModel,
    *,
    rows: Sequence[tuple[str, str]] = (),
    results: list[EvalResult] | None = None,
    sections: Sequence[str] = (),
    limits: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The card of what was trained, with metadata for the hub.

    Args:
        trained: with the protocol, which says what was done.
        rows: more of the table of facts, as name and value.
        results: scores, for the hub; None without one.
        sections: Markdown between the facts and the use.
        limits: more of them, in sentences.
        license: of the weights; None where nobody has named one: that of the text is not known.
    """
    stage, name = trained.stage, trained.name
    parts = [
        f"---\n{MARK}{_metadata(trained, results, license)}\n---",
        f"# {name}",
        ABOUT[stage].format_map(trained.protocol),
        markdown_table(["", ""], [*_facts(trained), *rows]),
        *sections,
        "## Use",
        "`pip install calm-lm`, then",
        _use(trained) + ("" if stage is Stage.AUTOENCODER else GENERATE) + "```",
    ]
    if stage is not Stage.AUTOENCODER:
        parts += ["## Limits", " ".join([LIMITS, *limits])]
    return "\n\n".join(parts) + "\n"


def write_model_card(trainer: CALMTrainer, metrics: dict[str, float]) -> None:
    """Write the card into the folder of the run; a card that a person has changed stays.

    Args:
        trainer: after training.
        metrics: of its evaluation, with names as in ``eval_results.json``; empty without one.
    """
    folder: Path = trainer.args.folder
    path = folder / CARD
    if path.is_file() and not path.read_text(encoding="utf-8").startswith("---\n" + MARK):
        return
    model: Any = trainer.model
    trained = TrainedModel(folder.name, model, trainer.protocol, trainer.state.global_step)
    results = None
    if "eval_brier_lm" in metrics:
        dataset = trained.protocol["dataset"] or "the training files"
        results = [brier_result(dataset, metrics["eval_brier_lm"])]
    write_atomically(path, model_card(trained, rows=_scores(metrics), results=results))


def brier_result(dataset: str, value: float, *, is_held_out: bool = True) -> EvalResult:
    """BrierLM on the held-out part of a text, or all of it, as the hub lists it."""
    return EvalResult(
        task_type="text-generation",
        dataset_type="held-out" if is_held_out else "text",
        dataset_name=f"held-out part of {dataset}" if is_held_out else dataset,
        metric_type="brier_lm",
        metric_name="BrierLM",
        metric_value=round(value, 3),
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _use(trained: TrainedModel) -> str:
    """How to load it."""
    names, folder = [type(trained.model).__name__.removeprefix("FSDP")], f'"{trained.name}"'
    if trained.name in PRETRAINED:
        names, folder = [*names, "pretrained_path"], f"pretrained_path({folder})"
    return USE.format(names=", ".join(names), folder=folder, model_class=names[0])


def _metadata(
    trained: TrainedModel,
    results: list[EvalResult] | None,
    license: str | None,
) -> str:
    stage = trained.stage
    data = ModelCardData(
        library_name="calm-lm",
        license=license,
        model_name=trained.name if results else None,
        pipeline_tag=None if stage is Stage.AUTOENCODER else "text-generation",
        tags=["calm", str(stage)],
        eval_results=results,
    )
    return data.to_yaml()


def _facts(trained: TrainedModel) -> list[tuple[str, str]]:
    record = trained.protocol
    train, training = record["train"], record["training"]
    text = trained.text
    if "tokens" in train:
        text += f": {train['tokens']:,} tokens"
    size = sum(parameter.numel() for parameter in trained.model.parameters())
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    batch *= training["world_size"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return [
        ("parameters", f"{size:,}"),
        ("trained on", text),
        ("tokenizer", f"{record['tokenizer']}, {record['vocab_size']:,} entries"),
        ("training", f"{trained.steps:,} steps of {batch} x {record['block_size']} tokens"),
        ("optimizer", f"{record['optimizer']}, seed {record['seed']}"),
        ("versions", versions),
    ]


def _scores(metrics: dict[str, float]) -> list[tuple[str, str]]:
    names = {
        "eval_loss": "held-out loss", "eval_accuracy": "held-out tokens reconstructed",
        "eval_brier_lm": "held-out BrierLM (0 to 100, higher is better)",
    }  # fmt: skip
    return [(title, f"{metrics[name]:.4g}") for name, title in names.items() if name in metrics]
