"""The demo: autoencoder, CALM and token baseline from nothing, in minutes on two cores.

Both language models train on the same text for the same seconds and are scored on the same held-out
documents. The output folder then holds three models that `calm generate` and `calm eval` load,
``report.md``, ``results.json`` and ``curves.png``.
"""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calm.data.blocks import Block
from calm.data.encoding import Encoder
from calm.data.options import OnError, TextUnit
from calm.decoding import generate
from calm.decoding.text.edges import text_after
from calm.evaluation import Evaluation, evaluate
from calm.experiments.demo_gap import measure_demo_gap
from calm.experiments.demo_health import measure_demo_health
from calm.experiments.demo_plot import plot_demo
from calm.experiments.demo_report import (
    DemoResults,
    LanguageModelResults,
    Sample,
    temperature_name,
    to_markdown,
)
from calm.experiments.demo_stages import StageRun, train_stage
from calm.labels import IGNORE_INDEX
from calm.training.checkpoints.lock import locked
from calm.training.flags.recipe import Stage
from calm.training.precision import has_bfloat16_units
from calm.training.trainer import CALMTrainer

__all__ = ["DemoOptions", "run_demo"]

EMBEDDED_TEXT = "docstrings of Python's standard library, flattened to sentences"
# Shares of the time; the rest is for reading the text, scoring and sampling.
AUTOENCODER_SHARE = 0.075
LANGUAGE_MODEL_SHARE = 0.33
CALM, READOUT, BASELINE = "CALM", "CALM, readout", "token by token"  # names of models
CURVE_SCORES = 8
CURVE = {"max_blocks": 24, "num_samples": 8}
FINAL = {"max_blocks": 240, "num_samples": 16}
SCORE_BATCH = 16
PROMPTS = ("Returns the ", "This is the ", "If the file ")
# If the text is the user's, prompts are the first tokens of held-out documents.
PROMPT_TOKENS = 16
PROMPT_BLOCKS = 32  # that are searched for such documents
SAMPLE_TOKENS = 160
TEMPERATURES = (1.0, 1 / 3)
CANDIDATES = 200  # of a vote at low temperature; with more of them texts repeat themselves


@dataclass(frozen=True)
class DemoOptions:
    """What the demo learns from, and for how long.

    Attributes:
        folder: of the three models and the report; created, or written over.
        text: files to learn from, as the flag ``--train_file`` takes them; None for the docstrings.
        text_unit: one document of a text file.
        on_error: ``stop`` or ``skip`` at text that cannot be read.
        minutes: time for all of it, positive.
        seed: of weights, batches and draws.
        recipe: name or file of the recipe that gives sizes and rates.
    """

    folder: Path
    text: str | None = None
    text_unit: TextUnit = "paragraph"
    on_error: OnError = "stop"
    minutes: float = 8.0
    seed: int = 1
    recipe: str = "demo"


def run_demo(options: DemoOptions) -> DemoResults:
    """Train, score and sample all three models; write them and the report to the folder.

    Returns: what ``results.json`` holds.
    Raises:
        UserError: the text or the recipe cannot be used, or another run writes to the folder.
    """
    folder = options.folder
    with locked(folder):
        results = _train_and_score(options)
        record = json.dumps(asdict(results), indent=1, ensure_ascii=False)
        (folder / "results.json").write_text(record + "\n", encoding="utf-8")
        (folder / "report.md").write_text(to_markdown(results), encoding="utf-8")
        plot_demo(results, folder / "curves.png")
    return results


def _train_and_score(options: DemoOptions) -> DemoResults:
    """The three stages, the autoencoder first; both language models get the same seconds."""
    began = time.perf_counter()
    folder = options.folder
    flags = _common_flags(options)
    trainer, autoencoder = train_stage(
        Stage.AUTOENCODER,
        [*flags, *_stage_flags(folder / "autoencoder", options.minutes * AUTOENCODER_SHARE)],
        title="autoencoder   ",
        score=_reconstruction,
        num_scores=CURVE_SCORES,
    )
    ae_flag = f"--ae_name_or_path={folder / 'autoencoder'}"
    calm_trainer, calm_run = _train(Stage.CALM, CALM, folder / "calm", [*flags, ae_flag], options)
    calm = _score(calm_trainer, calm_run, CALM, options)
    model: Any = calm_trainer.model
    readout = None
    if model.token_readout is not None:
        readout = _score(calm_trainer, calm_run, READOUT, options, is_readout=True)
    baseline_trainer, baseline_run = _train(
        Stage.BASELINE, BASELINE, folder / "baseline", flags, options
    )
    max_tokens = calm.evaluation.protocol["tokens"]
    baseline = _score(baseline_trainer, baseline_run, BASELINE, options, max_tokens=max_tokens)
    return DemoResults(
        text=options.text or EMBEDDED_TEXT,
        machine=_machine(),
        gap=measure_demo_gap(calm_trainer, baseline_trainer, options.minutes),
        health=measure_demo_health(calm_trainer),
        seconds=time.perf_counter() - began,
        peak_memory_bytes=_peak_memory_bytes(),
        accuracy=autoencoder.scores[-1]["accuracy"],
        autoencoder=autoencoder,
        calm=calm,
        readout=readout,
        baseline=baseline,
        commands=_commands(options, trainer),
    )


def _train(
    stage: Stage, name: str, folder: Path, flags: Sequence[str], options: DemoOptions
) -> tuple[CALMTrainer, StageRun]:
    """Train one language model for its share of the time."""
    return train_stage(
        stage,
        [*flags, *_stage_flags(folder, options.minutes * LANGUAGE_MODEL_SHARE)],
        title=f"{name:14}",
        score=_curve_score,
        num_scores=CURVE_SCORES,
    )


def _score(
    trainer: CALMTrainer,
    run: StageRun,
    name: str,
    options: DemoOptions,
    *,
    is_readout: bool = False,
    max_tokens: int | None = None,
) -> LanguageModelResults:
    """Evaluate a trained model (on `max_tokens` held-out tokens), and let it write.

    Args:
        trainer: with the model.
        run: its training.
        name: in tables and figures.
        options: of the demo.
        is_readout: whether its readout draws.
        max_tokens: None for all.
    """
    method = "readout" if is_readout else "direct"
    evaluation = _evaluate(trainer, max_tokens, method=method, **FINAL)
    tokenizer: Any = trainer.processing_class
    encode = Encoder(tokenizer).prompt
    prompts = [*map(encode, PROMPTS)] if options.text is None else _beginnings(trainer)
    samples, speeds = [], {}
    for temperature in TEMPERATURES:
        texts, speed = _continue(trainer, prompts, temperature, options.seed, is_readout)
        samples += [
            Sample(temperature, prompt, text)
            for prompt, text in zip(tokenizer.batch_decode(prompts), texts, strict=True)
        ]
        speeds[temperature_name(temperature)] = speed
    folder = str(trainer.args.output_dir)
    return LanguageModelResults(name, folder, run, evaluation, samples, speeds)


# Flags


def _common_flags(options: DemoOptions) -> list[str]:
    """Flags that all stages share, on top of the recipe."""
    flags = [f"--config={options.recipe}", f"--seed={options.seed}"]
    if options.text is not None:
        flags += ["--dataset_name=", f"--train_file={options.text}"]
        flags += [f"--text_unit={options.text_unit}", f"--on_error={options.on_error}"]
    if not torch.cuda.is_available():
        flags.append("--use_cpu=true")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if has_bfloat16_units(device):
        flags.append("--bf16=true")
    return flags


def _stage_flags(folder: Path, minutes: float) -> list[str]:
    """Flags of one stage: its folder, its time, and no output of the trainer."""
    return [
        f"--output_dir={folder}", "--overwrite_output_dir=true",
        f"--max_train_seconds={60 * minutes}", "--max_steps=-1",
        "--eval_strategy=no", "--save_strategy=no", "--disable_tqdm=true", "--report_to=none",
    ]  # fmt: skip


# Scores and samples


def _reconstruction(trainer: CALMTrainer) -> dict[str, float]:
    """Share of all held-out tokens that the autoencoder reconstructs."""
    return {"accuracy": trainer.evaluate()["eval_accuracy"]}


def _curve_score(trainer: CALMTrainer) -> dict[str, float]:
    """BrierLM on the first held-out blocks, its four terms and their errors."""
    evaluation = _evaluate(trainer, **CURVE)
    errors = evaluation.standard_errors or {}
    return {
        "BrierLM": evaluation.brier_lm,
        **evaluation.brier,
        **{f"{order}_se": error for order, error in errors.items()},
    }


def _evaluate(trainer: CALMTrainer, max_tokens: int | None = None, **settings: Any) -> Evaluation:
    blocks: Any = trainer.eval_dataset
    return evaluate(
        trainer.model,
        blocks if max_tokens is None else _first_tokens(blocks, max_tokens),
        skip_repeats=True,
        batch_size=SCORE_BATCH,
        **settings,
    )


def _first_tokens(blocks: Iterable[Block], max_tokens: int) -> Iterator[Block]:
    """Blocks with the first `max_tokens` tokens of the text: start chunks take room in a block."""
    for block in blocks:
        has_label = block["labels"] >= 0
        is_past = np.cumsum(has_label) > max_tokens
        yield {**block, "labels": np.where(is_past, IGNORE_INDEX, block["labels"])}
        max_tokens -= int(has_label.sum())
        if max_tokens <= 0:
            return


def _continue(
    trainer: CALMTrainer,
    prompts: list[list[int]],
    temperature: float,
    seed: int,
    is_readout: bool,
) -> tuple[list[str], float]:
    """Continuations of the prompts, and tokens/s of all together; the first run is a warm-up."""
    tokenizer: Any = trainer.processing_class
    for _ in range(2):
        found: Any = generate(
            trainer.model.eval(),
            prompts,
            max_new_tokens=SAMPLE_TOKENS,
            temperature=temperature,
            method="readout" if is_readout else "batch",
            num_samples=CANDIDATES,
            seed=seed,
            return_details=True,
        )
    texts = [
        text_after(tokenizer, prompt, row[len(prompt) : len(prompt) + count].tolist())
        for row, prompt, count in zip(found.sequences, prompts, found.new_tokens, strict=True)
    ]
    return texts, found.tokens_per_second


def _beginnings(trainer: CALMTrainer) -> list[list[int]]:
    """First tokens of some held-out documents; the same with start chunks or without."""
    blocks: Any = trainer.eval_dataset
    tokenizer: Any = trainer.processing_class
    labels = [blocks[index]["labels"] for index in range(min(PROMPT_BLOCKS, len(blocks)))]
    tokens = np.concatenate(labels)
    tokens = tokens[tokens >= 0]
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)
    long = [document for document in documents if len(document) > PROMPT_TOKENS]
    return [document[:PROMPT_TOKENS].tolist() for document in (long or [tokens])[: len(PROMPTS)]]


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _peak_memory_bytes() -> int:
    """Of this process; macOS reports bytes, other systems kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _commands(options: DemoOptions, trainer: CALMTrainer) -> list[str]:
    """Commands to try next; the second repeats the score of the report."""
    folder = options.folder / "calm"
    blocks: Any = trainer.eval_dataset
    data = options.text or trainer.protocol["dataset"]
    unit = "" if options.text is None else f" --text-unit {options.text_unit}"
    return [
        f'calm generate --model {folder} --prompt "{PROMPTS[0]}" --temperature 0.3333',
        f"calm eval --model {folder} --data {data}{unit} --block-size {blocks.block_size} "
        f"--validation-split-percentage {trainer.protocol['validation_split_percentage']} "
        f"--skip-repeats --num-samples {FINAL['num_samples']} "
        f"--max-blocks {min(len(blocks), FINAL['max_blocks'])}",
    ]
