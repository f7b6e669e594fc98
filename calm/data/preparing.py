"""A corpus becomes a folder of shards, part by part, in as many processes as wanted.

A run that was killed goes on when it is started again: finished shards are kept, an unfinished one
is written again. No process holds more than a batch of text and its tokens.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from calm.data.corpus import code_stamp, damage_advice
from calm.data.encoding import vocabulary_size
from calm.data.manifest import (
    DESCRIPTION,
    TRAIN,
    UNFINISHED,
    VALIDATION,
    Description,
    SourceRecord,
    read_description,
    write_description,
)
from calm.data.part_writer import Job, PartState, PartWriter, read_state
from calm.data.parts import Part, Source, plan_parts
from calm.data.shards import ENDS, TOKENS
from calm.data.tokenizer import tokenizer_hash
from calm.errors import UserError
from calm.integrity import MANIFEST, listed_names, new_digest, write_atomically
from calm.progress_bar import progress_bar

__all__ = ["clear_folder", "find_preparation", "request_of", "saved_tokenizer", "write_shards"]

logger = logging.getLogger(__name__)

REQUEST = "request.json"
POLL_SECONDS = 0.5


# What a folder holds


def request_of(sources: Sequence[Source], tokenizer_name: str, **settings: Any) -> dict[str, Any]:
    """What a prepared text depends on, in the forms of JSON."""
    stamps = {source.name: source.stamp for source in sources}
    request = {"sources": stamps, "tokenizer": tokenizer_name, **settings}
    return dict(json.loads(json.dumps(request)))


def find_preparation(folder: Path, request: dict[str, Any]) -> Literal["none", "begun", "finished"]:
    """How far `request` has come in `folder`.

    Raises:
        UserError: the folder holds something else: another text, or a model.
    """
    path = folder / UNFINISHED / REQUEST
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) == {**request, "code": code_stamp()}:
            return "begun"
        raise UserError(
            f"output: {folder} holds the beginning of another preparation (other sources, "
            "settings or code); pass --overwrite to start afresh, or another folder"
        )
    if (folder / DESCRIPTION).is_file():
        if read_description(folder).request == _hash(request):
            return "finished"
        raise UserError(
            f"output: {folder} holds another prepared text; pass --overwrite to replace it, or "
            "another folder"
        )
    if (folder / MANIFEST).is_file():
        raise UserError(f"output: {folder} holds a model; choose another folder")
    return "none"


def saved_tokenizer(folder: Path) -> Path:
    """Where an unfinished preparation keeps its tokenizer."""
    return folder / UNFINISHED / "tokenizer"


def _hash(request: dict[str, Any]) -> str:
    return str(new_digest(json.dumps(request, sort_keys=True).encode()).hexdigest())


def clear_folder(folder: Path) -> None:
    """Remove a preparation, finished or not, and nothing else."""
    if not ((folder / DESCRIPTION).is_file() or (folder / UNFINISHED).is_dir()):
        return
    _forget(folder)  # first: it says that shards are there
    if (folder / DESCRIPTION).is_file():  # then the manifest is its own: tokenizer and shards
        for name in listed_names(folder):
            (folder / name).unlink(missing_ok=True)  # they are files
    for path in (folder / MANIFEST, folder / DESCRIPTION):
        path.unlink(missing_ok=True)
    for split in (TRAIN, VALIDATION):
        for ending in (TOKENS, ENDS):
            for path in folder.glob(f"{split}-*{ending}"):
                path.unlink()
            for path in folder.glob(f".{split}-*{ending}.partial"):
                path.unlink()


def _forget(folder: Path) -> None:
    """Remove what an unfinished preparation remembers, all at once for whoever looks."""
    gone = folder / f"{UNFINISHED}.gone"
    shutil.rmtree(gone, ignore_errors=True)  # of a run that was killed here
    if (folder / UNFINISHED).is_dir():
        os.replace(folder / UNFINISHED, gone)
    shutil.rmtree(gone, ignore_errors=True)


# The preparation


def write_shards(
    job: Job,
    sources: Sequence[Source],
    request: dict[str, Any],
    *,
    weights: dict[str, Fraction] | None = None,
    workers: int = 1,
) -> Description:
    """Write all shards, the tokenizer and the record of both into the folder of `job`.

    Args:
        job: what to write, and how.
        sources: to read, in order.
        request: from `request_of`.
        weights: of the sources.
        workers: processes. One process leaves tokenization to the threads of tokenizers.

    Raises:
        UserError: text that cannot be read, or none; nothing to train on or to hold out.
    """
    folder = job.folder / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / REQUEST).is_file():
        job.tokenizer.save_pretrained(saved_tokenizer(job.folder))
        write_atomically(folder / REQUEST, json.dumps({**request, "code": code_stamp()}))
    parts = [
        part for source in sources for part in plan_parts(source, job.shard_size, job.text_unit)
    ]
    try:
        with progress_bar(
            total=sum(part.size for part in parts),
            desc="tokenizing",
            unit="B",
            unit_scale=True,
        ) as bar:
            states = _write_parts(job, parts, workers, bar)
        description = _describe(job, sources, parts, states, weights, _hash(request))
    except UserError:
        if not any(read_state(job.folder, part).hashes for part in parts):
            clear_folder(job.folder)  # nothing was finished that another run could keep
        raise
    saved = sorted(saved_tokenizer(job.folder).iterdir())  # saved once: a copy read back may differ
    for each in saved:
        if each.is_dir():  # of further chat templates
            shutil.copytree(each, job.folder / each.name, dirs_exist_ok=True)
    files = [Path(shutil.copy(file, job.folder)).name for file in saved if file.is_file()]
    write_description(job.folder, description, files)
    _forget(job.folder)
    return description


def _write_parts(job: Job, parts: list[Part], workers: int, bar: Any) -> list[PartState]:
    states = {part: read_state(job.folder, part) for part in parts}
    waiting = []
    for part, state in states.items():
        if state.is_finished:
            bar.update(part.size)
        else:
            waiting.append(part)
    if len(waiting) < len(parts):
        logger.info("%d of %d parts are finished already", len(parts) - len(waiting), len(parts))
    run = _in_this_process if min(workers, len(waiting)) <= 1 else _in_processes
    for part, state in run(job, waiting, workers, bar):
        states[part] = state
    stops = job.on_error == "stop"  # also at what an earlier run has skipped
    refused = [state for state in states.values() if state.is_refused or (stops and state.skipped)]
    if refused:
        count = sum(state.skipped for state in refused)
        raise UserError(damage_advice(str(refused[0].first_skipped), count - 1))
    return list(states.values())


Done = Iterator[tuple[Part, PartState]]


def _in_this_process(job: Job, parts: list[Part], workers: int, bar: Any) -> Done:
    writer = PartWriter(job, bar.update, lambda: False)
    for part in parts:
        state = writer.write(part)
        yield part, state
        if state.is_refused:
            return


def _in_processes(job: Job, parts: list[Part], workers: int, bar: Any) -> Done:
    """Parts as they are finished. At the first damage the others stop where they are."""
    begun = bar.n
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), context, initializer=_start, initargs=(job, count, stop)
    )
    with _without_threads(), pool:
        pending: dict[Future[PartState], Part] = {pool.submit(_work, part): part for part in parts}
        try:
            while pending:
                done, _ = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                bar.update(begun + count.value - bar.n)
                for future in done:
                    part, state = pending.pop(future), future.result()
                    if state.is_refused:
                        stop.set()
                        for other in list(pending):
                            if other.cancel():
                                del pending[other]
                    yield part, state
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _without_threads() -> Iterator[None]:
    """Without the threads of tokenizers where every process has a core of its own."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_writer: PartWriter


def _start(job: Job, count: Any, stop: Any) -> None:
    """Set a worker up; it ends with the process that started it."""
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tick(size: int) -> None:
        with count.get_lock():
            count.value += size

    _writer = PartWriter(job, tick, stop.is_set)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(part: Part) -> PartState:
    return _writer.write(part)


# The record


def _describe(
    job: Job,
    sources: Sequence[Source],
    parts: Sequence[Part],
    states: Sequence[PartState],
    weights: dict[str, Fraction] | None,
    request: str,
) -> Description:
    found: dict[str, list[PartState]] = {source.name: [] for source in sources}
    for part, state in zip(parts, states, strict=True):
        found[part.source].append(state)
    records = [_record(source, found[source.name], weights) for source in sources]
    description = Description(
        tokenizer_hash=tokenizer_hash(job.tokenizer),
        vocab_size=vocabulary_size(job.tokenizer),
        dtype=job.dtype.str,
        patch_size=job.patch_size,
        validation_split_percentage=job.percentage,
        text_unit=job.text_unit,
        request=request,
        sources=records,
        shards=[shard for state in states for shard in state.shards if shard.tokens],
    )
    _check_splits(description)
    return description


def _record(
    source: Source, states: Sequence[PartState], weights: dict[str, Fraction] | None
) -> SourceRecord:
    shards = [shard for state in states for shard in state.shards]
    digest = new_digest()
    for state in states:
        for each in state.hashes:
            digest.update(each.encode())
    skipped = source.skipped + sum(state.skipped for state in states)
    first = next((state.first_skipped for state in states if state.first_skipped), None)
    tokens = sum(shard.tokens for shard in shards)
    if not tokens:
        why = f"; {skipped} entries could not be read, the first: {first}" if skipped else ""
        raise UserError(f"source {source.name}: {source.text} holds no text{why}")
    return SourceRecord(
        name=source.name,
        weight=None if weights is None else str(weights[source.name]),
        dataset=None if source.files else source.text,
        files=[(Path(file).name, Path(file).stat().st_size) for file in source.files],
        documents=sum(shard.documents for shard in shards),
        characters=sum(shard.characters for shard in shards),
        tokens=tokens,
        skipped=skipped,
        first_skipped=first,
        hash=digest.hexdigest(),
    )


def _check_splits(description: Description) -> None:
    """Both sides hold documents, and with weights those of every source do so in training."""
    percentage = description.validation_split_percentage
    total = sum(source.documents for source in description.sources)
    for split in (TRAIN, VALIDATION):
        if not description.of_split(split) and (split == TRAIN or percentage > 0):
            raise UserError(
                f"{total} documents leave no {split} document if {percentage:g} % are held out; "
                "cut the text into more documents (text_unit), add text, or hold out another share"
            )
    if description.weights is not None:
        trained = {shard.source for shard in description.of_split(TRAIN)}
        if empty := [each.name for each in description.sources if each.name not in trained]:
            raise UserError(f"source {empty[0]}: all of its documents are held out; add text")
