"""A worker of `benchmarks.preparing`: prepares, encodes, trains, or finds a later batch.

``python -m benchmarks.workers.prepare_work --cores N``; it keeps to as many cores.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import skip_first_batches
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from benchmarks.shapes import STEP
from benchmarks.workers.protocol import reply_channel, serve
from calm.cli import main as cli
from calm.commands import prepare as _prepare_command  # noqa: F401 - imported before time counts
from calm.data import preparing as _preparing  # noqa: F401 - likewise
from calm.data.blocks import collate
from calm.data.order import ShuffledBlocks
from calm.data.prepared import PreparedText
from calm.data.tokenizer import load_tokenizer

BATCH = 1000  # documents of a call of encode_batch
AUTOENCODER = {
    "patch_size": STEP.patch_size,
    "hidden_size": STEP.ae_hidden_size,
    "intermediate_size": STEP.ae_intermediate_size,
    "latent_size": STEP.latent_size,
}
CALM = {
    "hidden_size": STEP.hidden_size,
    "intermediate_size": STEP.intermediate_size,
    "num_hidden_layers": STEP.num_layers,
    "num_attention_heads": STEP.num_heads,
    "num_key_value_heads": STEP.num_heads,
    "num_mlp_layers": STEP.num_blocks,
    "noise_size": STEP.noise_size,
    "num_samples": STEP.num_samples,
}


class Stopwatch:
    """Seconds of the clock, and of the processor in this process and those it has waited for."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), _processor_seconds()

    def read(self) -> dict[str, float]:
        """Since it was made."""
        wall = time.perf_counter() - self._wall
        return {"wall": wall, "processor": _processor_seconds() - self._processor}


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _run(*words: str) -> None:
    if status := cli(list(words)):
        raise RuntimeError(f"calm {words[0]} ended with exit status {status}")


def prepare(corpus: str, tokenizer: str, output: str, workers: int, percentage: int) -> Any:
    """`calm prepare`: its times."""
    watch = Stopwatch()
    flags = ["--workers", str(workers), "--validation-split-percentage", str(percentage)]
    _run("prepare", "--data", corpus, "--tokenizer", tokenizer, "--output", output, *flags)
    return watch.read()


def encode(corpus: str, tokenizer: str, ids: str | None) -> Any:
    """`encode_batch` of documents in memory: its times; the ids go to a file that is named."""
    with open(corpus, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    end = load_tokenizer(tokenizer).eos_token_id
    watch, found = Stopwatch(), []
    for start in range(0, len(texts), BATCH):
        encodings = encoder.encode_batch(texts[start : start + BATCH])
        if ids is not None:
            found += [np.array([*encoding.ids, end], dtype=np.int64) for encoding in encodings]
    times = watch.read()
    if ids is not None:
        np.save(ids, np.concatenate(found))
    return times


def train(text: str, folder: str, steps: int) -> Any:
    """Train `steps` steps of the bench configuration: what each of them logs."""
    common = [
        f"--train_file={text}", f"--tokenizer_name={text}", f"--block_size={STEP.block_size}",
        f"--per_device_train_batch_size={STEP.batch_size}", "--use_cpu", "--do_train",
        "--logging_steps=1", "--save_strategy=no", "--disable_tqdm=True",
        "--dataloader_pin_memory=False",
    ]  # fmt: skip
    autoencoder, calm_folder = f"{folder}/autoencoder", f"{folder}/calm"
    for name, stage, overrides, extra in (
        ("train-ae", autoencoder, AUTOENCODER, ["--max_steps=1"]),
        ("train", calm_folder, CALM, [f"--max_steps={steps}", f"--ae_name_or_path={autoencoder}"]),
    ):
        sizes = ",".join(f"{field}={value}" for field, value in overrides.items())
        _run(name, *common, f"--output_dir={stage}", f"--config_overrides={sizes}", *extra)
    state = json.loads(Path(calm_folder, "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "data_share" in entry]


def first_batch(text: str, steps: int) -> float:
    """Seconds from nothing to the batch after `steps` steps, as a run that goes on finds it."""
    started = time.perf_counter()
    blocks = ShuffledBlocks(
        PreparedText(text).blocks_for(
            load_tokenizer(text), "train", block_size=STEP.block_size,
            patch_size=STEP.patch_size, start_token_id=None,
        ),
        seed=0,
    )  # fmt: skip
    batches = blocks.batches(STEP.batch_size)
    epoch, done = divmod(steps, len(batches))
    batches.set_epoch(epoch)
    loader = DataLoader(blocks, batch_sampler=batches, collate_fn=collate)
    next(iter(skip_first_batches(loader, done)))
    return time.perf_counter() - started


def main() -> int:
    """Answer commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=int, required=True)
    cores = parser.parse_args().cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    replies = reply_channel()
    handlers = {
        "ready": lambda: None, "prepare": prepare, "encode": encode, "train": train,
        "first_batch": first_batch,
    }  # fmt: skip
    serve(handlers, sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
