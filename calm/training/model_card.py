"""The model card: ``README.md`` of a trained model's folder, as the Hugging Face hub shows it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from calm.integrity import write_atomically
from calm.training.recipe import Stage
from calm.training.trainer import CALMTrainer

__all__ = ["model_card", "write_model_card"]

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
from calm import {model_class}
from transformers import AutoTokenizer

model = {model_class}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
GENERATE = """\
ids = tokenizer("Returns the ", return_tensors="pt")["input_ids"]
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, temperature=0.5)[0]))
"""
LIMITS = (
    "It continues text like that it was trained on, follows no instructions, and states falsehoods."
)


def model_card(trainer: CALMTrainer, metrics: dict[str, float]) -> str:
    """The card of what `trainer` has trained, with metadata for the hub.

    No licence is named: that of the text is not known here.

    Args:
        trainer: after training; its protocol says what was done.
        metrics: of its evaluation, with names as in ``eval_results.json``; empty without one.
    """
    record, name = trainer.protocol, trainer.args.folder.name
    stage = Stage(record["stage"])
    about = ABOUT[stage].format_map(record)
    use = USE.format(model_class=type(trainer.model).__name__, name=name)
    parts = [
        f"---\n{_metadata(trainer, stage, metrics)}\n---",
        f"# {name}",
        about,
        _table([*_facts(trainer), *_scores(metrics)]),
        "## Use",
        "`pip install calm-lm`, then",
        use + ("" if stage is Stage.AUTOENCODER else GENERATE) + "```",
    ]
    if stage is not Stage.AUTOENCODER:
        parts += ["## Limits", LIMITS]
    return "\n\n".join(parts) + "\n"


def write_model_card(trainer: CALMTrainer, metrics: dict[str, float]) -> None:
    """Write `model_card` into the folder of the run; a card that a person has changed stays."""
    path: Path = trainer.args.folder / CARD
    if path.is_file() and not path.read_text(encoding="utf-8").startswith("---\n" + MARK):
        return
    write_atomically(path, model_card(trainer, metrics))


def _metadata(trainer: CALMTrainer, stage: Stage, metrics: dict[str, float]) -> str:
    dataset = trainer.protocol["dataset"]
    results = None
    if "eval_brier_lm" in metrics:
        results = [
            EvalResult(
                task_type="text-generation", dataset_type="held-out",
                dataset_name=f"held-out part of {dataset or 'the training files'}",
                metric_type="brier_lm", metric_name="BrierLM",
                metric_value=round(metrics["eval_brier_lm"], 3),
            )
        ]  # fmt: skip
    data = ModelCardData(
        library_name="calm-lm",
        model_name=trainer.args.folder.name if results else None,
        pipeline_tag=None if stage is Stage.AUTOENCODER else "text-generation",
        tags=["calm", str(stage)],
        eval_results=results,
    )
    return MARK + data.to_yaml()


def _facts(trainer: CALMTrainer) -> list[tuple[str, str]]:
    record, state, args = trainer.protocol, trainer.state, trainer.args
    train: dict[str, Any] = record["train"]
    files = record["train_files"]
    text = record["dataset"] or ", ".join(files[:3]) + (" and more" if len(files) > 3 else "")
    if "tokens" in train:
        text += f": {train['tokens']:,} tokens"
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return [
        ("parameters", f"{size:,}"),
        ("trained on", text),
        ("tokenizer", f"{record['tokenizer']}, {record['vocab_size']:,} entries"),
        ("training", f"{state.global_step:,} steps of {batch} x {record['block_size']} tokens"),
        ("optimizer", f"{record['optimizer']}, seed {record['seed']}"),
        ("versions", versions),
    ]


def _scores(metrics: dict[str, float]) -> list[tuple[str, str]]:
    names = {
        "eval_loss": "held-out loss", "eval_accuracy": "held-out tokens reconstructed",
        "eval_brier_lm": "held-out BrierLM (0 to 100, higher is better)",
    }  # fmt: skip
    return [(title, f"{metrics[name]:.4g}") for name, title in names.items() if name in metrics]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
