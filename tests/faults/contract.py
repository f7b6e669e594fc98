"""The resume contract: every recorded setting changed, and one folder started twice."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.jobs import contents, is_one_line, job, result, started, train, wait
from tests.faults.report import Result, choose

__all__ = ["run"]

SIZES = "hidden_size=16,intermediate_size=24,latent_size=8"
# Flags that change the numbers of a run. All but the last ones may be allowed.
ALLOWED = (
    "--learning_rate=3e-3", "--weight_decay=0.5", "--adam_beta1=0.8", "--adam_beta2=0.9",
    "--adam_epsilon=1e-3", "--lr_scheduler_type=constant", "--warmup_steps=3", "--max_grad_norm=3",
    "--seed=7", "--data_seed=7", "--block_size=64", "--per_device_train_batch_size=3",
    "--gradient_accumulation_steps=2", "--max_train_samples=5", "--validation_split_percentage=30",
    "--dataloader_drop_last", "--train_sampling_strategy=sequential", "--neftune_noise_alpha=5",
    "--eval_seed=3", f"--config_overrides={SIZES},kl_weight=0.5",
    f"--config_overrides={SIZES},kl_clamp=0.1", f"--config_overrides={SIZES},ae_dropout=0",
)  # fmt: skip
NEVER = (
    "--tokenizer_name=bpe:300", "--optim=sgd", "--muon_learning_rate=0.01",
    "--config_overrides=hidden_size=24,intermediate_size=24,latent_size=8",
    "--config_overrides=hidden_size=16,intermediate_size=32,latent_size=8",
    "--config_overrides=hidden_size=16,intermediate_size=24,latent_size=4",
    "--config_overrides=hidden_size=16,intermediate_size=24,latent_size=8,num_decoder_layers=4",
    "--config_overrides=hidden_size=16,intermediate_size=24,latent_size=8,patch_size=2",
    "--torch_dtype=bfloat16 --optim=sgd",
)  # fmt: skip
PAIRS = 36


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """Change one thing at a time between a run and its continuation; start a folder twice.

    Args:
        folder: scratch space.
        count: settings, and pairs of starts; None for all.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    ended = train(whole, "autoencoder", "--do_train", "--do_eval")
    assert ended.status == 0, ended.errors
    for flag in choose(ALLOWED, count):
        yield from _changed(whole, flag, may_be_allowed=True)
    for flag in choose(NEVER, count):
        yield from _changed(whole, flag, may_be_allowed=False)
    yield _appended(whole)
    yield _stage(whole)
    for pair in choose(range(PAIRS), count):
        yield _started_twice(whole, folder / "twice", delay=pair / PAIRS)


def _changed(whole: Path, flag: str, *, may_be_allowed: bool) -> Iterator[Result]:
    words = ("--do_train", "--do_eval", "--max_steps=6", *flag.split())
    before = contents(whole / "autoencoder")
    ended = train(whole, "autoencoder", *words)
    is_ok = is_one_line(ended) and contents(whole / "autoencoder") == before
    yield Result(f"resume with {flag}", "refused" if is_ok else "other", is_ok, ended.errors[-600:])
    place = whole.with_name("allowed")
    shutil.copytree(whole, place)
    ended = train(place, "autoencoder", *words, "--allow_changes")
    is_ok = ended.status == 0 if may_be_allowed else is_one_line(ended)
    outcome = ("went on" if may_be_allowed else "refused") if is_ok else "other"
    yield Result(f"resume with {flag}, changes allowed", outcome, is_ok, ended.errors[-600:])
    shutil.rmtree(place)


def _appended(whole: Path) -> Result:
    """A document is appended to the text."""
    place = whole.with_name("appended")
    shutil.copytree(whole, place)
    with (place / "text.jsonl").open("a") as handle:
        handle.write('{"text": "one more document that nobody has seen"}\n' * 9)
    ended = train(place, "autoencoder", "--do_train", "--do_eval", "--max_steps=6")
    is_ok = is_one_line(ended) and "data_hash" in ended.errors
    shutil.rmtree(place)
    return Result("resume after documents were appended", "refused" if is_ok else "other", is_ok)


def _stage(whole: Path) -> Result:
    """The baseline in the autoencoder's folder."""
    before = contents(whole / "autoencoder")
    ended = train(whole, "baseline", f"--output_dir={whole / 'autoencoder'}")
    is_ok = is_one_line(ended) and contents(whole / "autoencoder") == before
    return Result("another stage in the folder", "refused" if is_ok else "other", is_ok)


def _started_twice(whole: Path, place: Path, delay: float) -> Result:
    """The same command again `delay` seconds later: one trains, the other is refused or resumes."""
    from training_cases import MAIN

    place.mkdir()
    shutil.copy(whole / "text.jsonl", place)
    words = job(place, "autoencoder", "--do_train", "--do_eval")
    logs = [place.with_name(f"twice-{number}.log") for number in (1, 2)]

    def work() -> int:
        return MAIN["autoencoder"](words)

    with started(work, logs[0]) as first:
        time.sleep(delay)
        with started(work, logs[1]) as second:
            ends = [wait(first, logs[0]), wait(second, logs[1])]
    has_finished = [end.status == 0 for end in ends]
    is_told = [is_one_line(end) and "another run" in end.errors for end in ends]
    is_ok = any(has_finished) and all(map(max, has_finished, is_told))
    is_ok = is_ok and result(place / "autoencoder") == result(whole / "autoencoder")
    shutil.rmtree(place)
    names = sorted("finished" if end.status == 0 else "refused" for end in ends)
    detail = " | ".join(end.errors[-300:] for end in ends)
    return Result(f"started twice, {delay:.2f} s apart", ", ".join(names), is_ok, detail)
