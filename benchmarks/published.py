"""The published CALM code against ours, in two processes on the same work.

``python -m benchmarks.published --checkout DIR --python INTERPRETER [--json FILE]``

DIR is your own checkout of the published code (github.com/shaochenze/calm); none of it is part of
this project. INTERPRETER belongs to an environment of its own, for instance

    git clone https://github.com/shaochenze/calm published-calm
    python3.11 -m venv published-env
    published-env/bin/pip install torch==2.13.0 transformers==4.43.0 accelerate==0.30.1 numpy

which is what was tested (Python 3.11, tokenizers 0.19.1). flash-attn and deepspeed are not needed.

Both processes load the same checkpoint: random weights at the bench configuration
(benchmarks/shapes.py), in float32. Parity comes first, and nothing is timed if it fails. Then the
processes work in turn, and each round gives one ratio, published / ours, so that a change of the
machine's speed meets both. The published code runs with its defaults (M = 100 drawn targets, N =
200 candidates at T = 1/2), ours with its own. Both use the same fused AdamW.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.machine import current_commit, load_average, machine_info
from benchmarks.models import autoencoder_config, calm_config
from benchmarks.report import published_table
from benchmarks.shapes import DECODING, STEP
from benchmarks.workers.protocol import Worker, WorkerError
from calm import EnergyTransformer

__all__ = ["main", "measure_work", "ratios_of"]

ROOT = Path(__file__).resolve().parents[1]
THREADS, ROUNDS, WARMUP_ROUNDS = 2, 7, 2
SEED = 5
NEEDED = ("models/modeling_energy.py", "models/modeling_autoencoder.py")
INSTALL = "pip install torch==2.13.0 transformers==4.43.0 accelerate==0.30.1 numpy"


class SetupError(RuntimeError):
    """The checkout or its environment lacks something."""


@dataclass(frozen=True)
class Work:
    """One row: what both workers are told to do."""

    name: str
    checkpoint: str
    command: str
    options: dict[str, Any]


def text_options(prompt: str, temperature: float) -> dict[str, Any]:
    """Of the commands that continue a prompt."""
    return {"inputs": prompt, "new_tokens": DECODING.new_tokens, "temperature": temperature}


def works(folder: Path) -> list[Work]:
    """Every row, by the files that `write_inputs` leaves in `folder`."""
    batch, prompt = str(folder / "batch"), str(folder / "prompt")

    def text(name: str, checkpoint: str, temperature: float) -> Work:
        options = {**text_options(prompt, temperature), "seed": SEED}
        return Work(f"{DECODING.new_tokens} tokens, {name}", checkpoint, "time_text", options)

    return [
        Work("evaluation forward", "varied", "time_evaluation", {"inputs": batch}),
        text("T = 1", "varied", 1.0),
        text("T = 1/2, candidates differ", "varied", 0.5),
        text("T = 1/2, candidates agree", "agreeing", 0.5),
        Work("training step", "varied", "time_training", {"inputs": batch}),
    ]


# Inputs


def write_inputs(folder: Path) -> None:
    """Checkpoints with random weights, a batch, a prompt and draws, as files in `folder`.

    Of the checkpoint ``varied`` hardly two candidates agree; of ``agreeing`` all do, because its
    head barely hears the noise.
    """
    torch.manual_seed(0)
    scale = {"initializer": "fan_in", "embedding_std": 1.0}
    autoencoder = autoencoder_config(DECODING, **scale)
    config = calm_config(
        DECODING, ae_config=autoencoder, num_samples=STEP.num_samples, eos_token_id=None, **scale
    )
    model = EnergyTransformer(config)
    save_as_published(model.ae_model, folder / "autoencoder")
    save_as_published(model, folder / "varied")
    with torch.no_grad():
        embedding = model.mlp_generator.noise_embd
        embedding.weight.mul_(1e-4)
        torch.nn.init.normal_(embedding.bias)  # a norm follows, so that noise alone has no scale
    save_as_published(model, folder / "agreeing")

    rows = STEP.batch_size * (STEP.block_size // STEP.patch_size - 1)
    tokens = torch.randint(STEP.vocab_size, (STEP.batch_size, STEP.block_size))
    torch.save(tokens, folder / "batch")
    torch.save(torch.randint(STEP.vocab_size, (1, DECODING.prompt_tokens)), folder / "prompt")
    draws = {
        "head_noise": torch.rand(STEP.num_samples, rows, STEP.noise_size) - 0.5,
        "target_noise": torch.randn(STEP.num_targets, rows, STEP.latent_size),
    }
    torch.save(draws, folder / "draws")


def save_as_published(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint as the published scripts write it: not safetensors, and the autoencoder's tied
    weight under both of its names.
    """
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    for name in [name for name in weights if name.endswith("encoder.embed_tokens.weight")]:
        head = name.replace("encoder.embed_tokens.weight", "decoder.lm_head_weight")
        weights[head] = weights[name]
    torch.save(weights, folder / "pytorch_model.bin")


def load(workers: Sequence[Worker], folder: Path, checkpoint: str) -> None:
    """The same weights in every worker."""
    for worker in workers:
        worker("load", folder=str(folder / checkpoint), autoencoder=str(folder / "autoencoder"))


# Parity


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def require(fact: bool, text: str) -> str:
    """The text of a fact that holds; else an error."""
    if not fact:
        raise AssertionError(f"the published code and ours disagree, nothing is timed: {text}")
    return text


def parity(ours: Worker, published: Worker, folder: Path) -> list[str]:
    """Everything that must agree before anything is timed, a line for each fact."""
    facts = []
    for checkpoint in ("varied", "agreeing"):
        load((ours, published), folder, checkpoint)
        facts += [f"{checkpoint}: {fact}" for fact in same_model(ours, published, folder)]
        facts += [f"{checkpoint}: {fact}" for fact in same_texts(ours, published, folder)]
    load((ours, published), folder, "varied")
    return facts + same_loss(ours, published, folder)


def same_model(ours: Worker, published: Worker, folder: Path) -> list[str]:
    """Posterior, hidden states, latents, logits and scores, with the same draws."""
    given = {"inputs": str(folder / "batch"), "draws": str(folder / "draws")}
    found = []
    for worker in (ours, published):
        path = folder / f"parts of {worker.name}"
        worker("write_parts", **given, result=str(path))
        found.append(torch.load(path))
    mine, theirs = found
    facts = []
    for name, expected in theirs.items():
        error = relative_error(mine[name], expected)
        facts.append(require(error < 1e-4, f"{name} {list(expected.shape)} within {error:.0e}"))
    actual, expected = (worker("scores", **given) for worker in (ours, published))
    for name, value in expected.items():
        close = math.isclose(actual[name], value, rel_tol=1e-4, abs_tol=1e-6)
        facts.append(require(close, f"evaluation {name} {actual[name]:.5f} and {value:.5f}"))
    return facts


def same_texts(ours: Worker, published: Worker, folder: Path) -> list[str]:
    """With the noise of ours the published code writes the same text.

    At T = 1/2 its vote is given our choice, which must be among those that it could choose.
    """
    facts = []
    for temperature, draws in ((1.0, 1), (0.5, DECODING.num_samples)):
        path, options = str(folder / "text"), text_options(str(folder / "prompt"), temperature)
        ours("write_text", **options, seed=SEED, draws=draws, result=path)
        share = published(
            "follow_text", inputs=options["inputs"], temperature=temperature, text=path
        )
        facts.append(require(share == 1, f"text at T = {temperature:g}: {share:.0%} of chunks"))
    return facts


def same_loss(ours: Worker, published: Worker, folder: Path) -> list[str]:
    """Losses of some training steps and the first gradients with the same draws; then the mean loss
    with the draws of each, where ours takes its targets analytically.
    """
    given = {"inputs": str(folder / "batch"), "draws": str(folder / "draws"), "steps": 3}
    losses, gradients = [], []
    for worker in (ours, published):
        path = folder / f"gradients of {worker.name}"
        losses.append(worker("train_with_draws", **given, result=str(path)))
        gradients.append(torch.load(path))
    text = " and ".join(", ".join(f"{loss:.5f}" for loss in each) for each in losses)
    close = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(*losses, strict=True))
    facts = [require(close, f"training losses with given draws {text}")]
    mine, theirs = gradients
    require(mine.keys() == theirs.keys(), f"trained: {sorted(mine.keys() ^ theirs.keys())}")
    worst = max(relative_error(mine[name], theirs[name]) for name in theirs)
    facts.append(require(worst < 1e-2, f"gradients of {len(theirs)} tensors within {worst:.0e}"))
    load((ours, published), folder, "varied")
    (mean, error), (other, other_error) = (
        worker("mean_loss", inputs=given["inputs"], repeats=16) for worker in (ours, published)
    )
    gap, allowed = abs(mean - other), 4 * math.hypot(error, other_error)
    text = f"mean training loss with default draws {mean:.4f} and {other:.4f}"
    return [*facts, require(gap < allowed, f"{text}: gap {gap:.4f}, allowed {allowed:.4f}")]


# Times


def measure_work(ours: Worker, published: Worker, work: Work, rounds: int) -> dict[str, Any]:
    """Times of one row, the two workers in turn; who begins alternates."""
    times: dict[str, list[float]] = {ours.name: [], published.name: []}
    for index in range(WARMUP_ROUNDS + rounds):
        for worker in (ours, published) if index % 2 else (published, ours):
            value = worker(work.command, **work.options)
            if index >= WARMUP_ROUNDS:
                times[worker.name].append(value)
    return ratios_of(times[ours.name], times[published.name])


def ratios_of(ours: Sequence[float], published: Sequence[float]) -> dict[str, Any]:
    """Medians and the ratios of the rounds."""
    ratios = [theirs / mine for mine, theirs in zip(ours, published, strict=True)]
    return {
        "ours_ms": statistics.median(ours),
        "published_ms": statistics.median(published),
        "least_ratio": min(ratios),
        "median_ratio": statistics.median(ratios),
        "rounds": len(ratios),
    }


def compare(ours: Worker, published: Worker, folder: Path, rounds: int) -> dict[str, Any]:
    """Parity, then every row, then the peak memory of both processes."""
    results: dict[str, Any] = {"parity": parity(ours, published, folder), "rows": {}}
    print(*results["parity"], "", sep="\n", flush=True)
    for work in works(folder):
        load((ours, published), folder, work.checkpoint)
        results["rows"][work.name] = measure_work(ours, published, work, rounds)
    memory = [worker("peak_memory_mib") for worker in (ours, published)]
    results["peak_memory_mib"] = dict(zip(("ours", "published"), memory, strict=True))
    return results


# Processes


def check_setup(checkout: Path) -> None:
    """The checkout has the files that are imported."""
    for name in NEEDED:
        if not (checkout / name).is_file():
            raise SetupError(f"--checkout: {checkout} has no {name}; see --help for git clone")


@contextmanager
def workers_of(checkout: Path, interpreter: str) -> Iterator[tuple[Worker, Worker]]:
    """Both workers, ready: ours and the published code's."""
    check_setup(checkout)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    environment = {**os.environ, **quiet, **threads, "PYTHONPATH": str(ROOT)}

    def worker(name: str, python: str, module: str, *arguments: str) -> Worker:
        command = [python, "-m", f"benchmarks.workers.{module}", "--threads", str(THREADS)]
        return Worker(name, [*command, *arguments], environment=environment)

    with (
        worker(
            "published", interpreter, "published_code", "--checkout", str(checkout)
        ) as published,
        worker("ours", sys.executable, "our_code") as ours,
    ):
        try:
            published("versions")
        except WorkerError as error:
            raise SetupError(
                f"{error}\n--python: {interpreter} cannot import the published code (its message "
                f"is above). Install what is missing there: {INSTALL}"
            ) from error
        yield ours, published


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="the published code")
    parser.add_argument("--python", required=True, help="the interpreter of its environment")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each row ({ROUNDS})")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    info: dict[str, Any] = {
        "machine_info": {**machine_info(THREADS), "load_average": load_average()},
        "commit_info": {"id": current_commit(ROOT)},
    }
    try:
        with (
            workers_of(arguments.checkout.resolve(), arguments.python) as (ours, published),
            tempfile.TemporaryDirectory() as folder,
        ):
            write_inputs(Path(folder))
            info["published_info"] = {
                **published("versions"),
                "commit": current_commit(arguments.checkout),
            }
            results = info | compare(ours, published, Path(folder), arguments.rounds)
    except (AssertionError, SetupError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(published_table([results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
