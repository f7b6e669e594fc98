"""`calm prepare` against `encode_batch` of tokenizers, and what training on prepared text costs.

``python -m benchmarks.preparing [--workers N ...] [--json FILE]``, on Linux, 15 minutes or more.

The text is the Python sources of the installed packages, a document a file; nothing of it is kept.
A byte-level BPE is trained on a part of it. Parity comes first: `calm prepare` writes the ids that
`encode_batch` gives, in any number of processes. Then both work in turn in processes of their own,
held to as many cores as there are workers: prepare with reading, dealing, writing and hashing,
`encode_batch` on documents that are in memory already. A ratio is encode_batch / prepare of one
round; imports count for neither. Peak memory is that of each process of prepare, the largest
first, above what the first held after its imports; mapped files count for nothing.

Training is 15 steps of the bench configuration (benchmarks/shapes.py) by the command line; shares
of a step are those that it logs, without the first three steps. Resuming is the time from nothing
to the batch after 10,000 steps.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import current_commit, load_average, machine_info
from benchmarks.shapes import STEP
from benchmarks.tables import table
from benchmarks.workers.protocol import Worker
from calm.data.manifest import TRAIN, read_description
from calm.data.shards import TOKENS
from calm.data.tokenizer import train_bpe_tokenizer

__all__ = ["held", "main", "ratios", "results_table", "shard_ids", "write_corpus"]

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES, LEARNED_MEGABYTES = 50, 5  # of the text; of its part that the tokenizer is trained on
ROUNDS = 5
STEPS, WARMUP_STEPS = 15, 3
RESUMED_STEP = 10_000
HELD_OUT = 5  # percent, of the text that is trained on
POLL_SECONDS = 0.02
MIB = 1024.0  # KiB


# Text


def sources(folder: Path) -> Iterator[str]:
    """Python files below `folder` that are UTF-8 and not empty, in order of their paths."""
    for path in sorted(folder.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def write_corpus(texts: Iterator[str], path: Path, size: int) -> list[str]:
    """Write documents of at least `size` bytes as ``.jsonl``; they are returned.

    Raises:
        SystemExit: there are fewer.
    """
    written, held = [], 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
            written.append(text)
            held += len(text.encode())
            if held >= size:
                return written
    raise SystemExit(f"error: the packages hold {held / 1e6:.0f} MB of Python; lower --megabytes")


def first_of(texts: Sequence[str], size: int) -> list[str]:
    """The first texts, of at least `size` characters or all."""
    held, chosen = 0, []
    for text in texts:
        if held >= size:
            break
        chosen.append(text)
        held += len(text)
    return chosen


def shard_ids(folder: Path) -> np.ndarray:
    """All ids that a folder holds for training, in order."""
    description = read_description(folder)
    return np.concatenate(
        [
            np.fromfile(folder / f"{shard.name}{TOKENS}", dtype=description.dtype)
            for shard in description.of_split(TRAIN)
        ]
    )


# Processes


@contextmanager
def worker(cores: int) -> Iterator[Worker]:
    """A fresh process on some cores, which has imported everything."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(cores),
        "RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true", "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.workers.prepare_work"]
    with Worker(
        "prepare_work", [*command, "--cores", str(cores)], environment=environment
    ) as process:
        process("ready")
        yield process


def _status(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def held(status: Mapping[str, str], most: str) -> float:
    """Memory of its own that a process holds, MiB: `most` is VmRSS (now) or VmHWM (at its peak)."""
    now = {name: int(status[name].split()[0]) / MIB for name in (most, "RssFile", "RssShmem")}
    return now[most] - now["RssFile"] - now["RssShmem"]


def peaks_of(process: int) -> dict[int, float]:
    """The most that a process and its children have held so far, by their ids."""
    found = {int(name): _status(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    return {
        number: held(status, "VmHWM")
        for number, status in found.items()
        if process in (number, int(status.get("PPid", 0))) and "VmHWM" in status
    }


@contextmanager
def watched(process: int) -> Iterator[dict[int, float]]:
    """Gathers the peaks of a process and its children above what it holds now."""
    base = held(_status(process), "VmRSS")
    above: dict[int, float] = {}
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            above.update({each: peak - base for each, peak in peaks_of(process).items()})
            stop.wait(POLL_SECONDS)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield above
    finally:
        stop.set()
        thread.join()


# Measurements


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def ratios(ours: Sequence[float], raw: Sequence[float]) -> dict[str, Any]:
    """Medians in seconds, and the ratios raw / ours of the rounds."""
    found = [other / own for own, other in zip(ours, raw, strict=True)]
    return {
        "prepare_s": statistics.median(ours),
        "encode_batch_s": statistics.median(raw),
        "least_ratio": min(found),
        "median_ratio": statistics.median(found),
        "rounds": len(found),
    }


class Bench:
    """The text, its tokenizer, and a folder for what is written."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        self.folder, self.corpus = folder, folder / "text.jsonl"
        self.tokenizer = folder / "tokenizer"
        installed = Path(sysconfig.get_path("purelib"))
        texts = write_corpus(sources(installed), self.corpus, int(megabytes * 1e6))
        learned = first_of(texts, int(LEARNED_MEGABYTES * 1e6))
        train_bpe_tokenizer(learned, STEP.vocab_size).save_pretrained(self.tokenizer)
        self.size = sum(len(text.encode()) for text in texts)
        self.documents = len(texts)
        self._count = 0

    def prepare(self, workers: int, percentage: int = 0) -> tuple[Path, Any, list[float]]:
        """A new prepared folder, the times, and the peaks of all processes."""
        self._count += 1
        output = self.folder / f"out{self._count}"
        with worker(workers) as process, watched(process.process.pid) as peaks:
            times = process(
                "prepare", corpus=str(self.corpus), tokenizer=str(self.tokenizer),
                output=str(output), workers=workers, percentage=percentage,
            )  # fmt: skip
        return output, times, sorted(peaks.values(), reverse=True)

    def encode(self, cores: int, ids: Path | None = None) -> Any:
        """The times of `encode_batch`; its ids go to `ids`."""
        with worker(cores) as process:
            return process(
                "encode", corpus=str(self.corpus), tokenizer=str(self.tokenizer),
                ids=ids and str(ids),
            )  # fmt: skip

    def parity(self, workers: Sequence[int]) -> list[str]:
        """A line for each number of processes, once its ids are those of `encode_batch`."""
        expected = self.folder / "ids.npy"
        self.encode(max(workers), expected)
        facts = []
        for count in workers:
            found = shard_ids(self.prepare(count)[0])
            if not np.array_equal(found, np.load(expected)):
                raise AssertionError(
                    f"{_processes(count)}: other ids than encode_batch; nothing is timed"
                )
            facts.append(f"{_processes(count)}: {len(found):,} ids are those of encode_batch")
        return facts

    def times(self, workers: int, rounds: int) -> dict[str, Any]:
        """Both in turn; who begins alternates."""
        found: dict[str, list[Any]] = {"prepare": [], "encode": []}
        peaks: list[list[float]] = []
        for index in range(rounds):
            for name in ("prepare", "encode") if index % 2 else ("encode", "prepare"):
                if name == "encode":
                    found[name].append(self.encode(workers))
                else:
                    output, times, above = self.prepare(workers)
                    shutil.rmtree(output)
                    found[name].append(times)
                    peaks.append(above)
        both = {
            clock: ratios(*([times[clock] for times in found[name]] for name in found))
            for clock in ("wall", "processor")
        }
        return {**both, "peak_memory_mib": [max(each) for each in zip(*peaks, strict=False)]}

    def training(self, cores: int, steps: int, rounds: int) -> dict[str, Any]:
        """Shares of a step, and how long the first batch takes after none and many steps."""
        text = str(self.prepare(1, HELD_OUT)[0])
        with worker(cores) as process:
            logged = process("train", text=text, folder=str(self.folder), steps=steps)
        counted = logged[min(WARMUP_STEPS, steps - 1) :]
        shares = [entry["data_share"] for entry in counted]
        first: dict[str, list[float]] = {"0": [], str(RESUMED_STEP): []}
        for _ in range(rounds):
            for done, seconds in first.items():
                with worker(cores) as process:
                    seconds.append(process("first_batch", text=text, steps=int(done)))
        return {
            "steps": len(counted),
            "tokens_per_second": statistics.median(e["tokens_per_second"] for e in counted),
            "median_data_share": statistics.median(shares),
            "greatest_data_share": max(shares),
            "first_batch_s": {done: statistics.median(found) for done, found in first.items()},
        }


def results_table(results: Mapping[str, Any]) -> str:
    """All figures as one Markdown table."""
    rows = []
    for name, row in results["rows"].items():
        for clock in ("wall", "processor"):
            found = row[clock]
            rows.append(
                [
                    f"{name}, {clock} time: encode_batch / prepare",
                    f"{found['median_ratio']:.2f}, at least {found['least_ratio']:.2f} "
                    f"({found['encode_batch_s']:.1f} s and {found['prepare_s']:.1f} s)",
                ]
            )
        rows.append(
            [
                f"{name}, peak memory of each process above imports",
                ", ".join(f"{peak:.0f}" for peak in row["peak_memory_mib"]) + " MiB",
            ]
        )
    training = results["training"]
    rows.append(
        [
            f"share of a training step that waits for data, {training['steps']} steps",
            f"{training['median_data_share']:.2%}, at most {training['greatest_data_share']:.2%}",
        ]
    )
    rows += [
        [f"from nothing to the first batch after {int(done):,} steps", f"{seconds:.2f} s"]
        for done, seconds in training["first_batch_s"].items()
    ]
    return table(("figure", "measured"), rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, nargs="+", default=sorted({1, cores}), metavar="N",
        help="processes of calm prepare, and cores of both (default: 1, and all)",
    )  # fmt: skip
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help=f"text ({MEGABYTES})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each row ({ROUNDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    arguments = parser.parse_args(argv)
    if not all(1 <= count <= cores for count in arguments.workers):
        parser.error(f"--workers: from 1 to the {cores} cores of this process")
    machine = {**machine_info(cores), "load_average": load_average()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.megabytes)
        facts = bench.parity(arguments.workers)
        print(*facts, "", sep="\n", flush=True)
        results = {
            "machine_info": machine,
            "commit_info": {"id": current_commit(ROOT)},
            "text": {"bytes": bench.size, "documents": bench.documents},
            "vocab_size": STEP.vocab_size,
            "parity": facts,
            "rows": {
                _processes(count): bench.times(count, arguments.rounds)
                for count in arguments.workers
            },
            "training": bench.training(cores, arguments.steps, arguments.rounds),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(results_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
