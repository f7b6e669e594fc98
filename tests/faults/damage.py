"""Every file of a checkpoint and of an autoencoder, damaged in five ways: never trained on."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.jobs import Ended, fork, is_one_line, result, train
from tests.faults.report import Result, choose

__all__ = ["run"]


def truncate(path: Path) -> None:
    """The last half is gone."""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """A page, or all of a smaller file, became zeros."""
    with path.open("r+b") as handle:
        handle.seek(max(0, path.stat().st_size - 4096) // 2)
        handle.write(bytes(min(4096, path.stat().st_size)))


def flip(path: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """No bytes are left."""
    os.truncate(path, 0)


HARMS: tuple[Callable[[Path], None], ...] = (truncate, zero, flip, Path.unlink, empty)


def run(folder: Path, count: int | None = None) -> Iterator[Result]:
    """Damage one file at a time and go on: of a checkpoint, then of a language model's autoencoder.

    Args:
        folder: scratch space.
        count: cases of each; None for all.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    for stage, extra in (("autoencoder", "--max_steps=4"), ("calm", _autoencoder_in(whole))):
        ended = train(whole, stage, extra)
        assert ended.status == 0, ended.errors
    yield from _checkpoints(whole, folder / "damaged", count)
    yield from _autoencoders(whole, folder / "damaged", count)


def _cases(folder: Path, count: int | None) -> list[tuple[str, Callable[[Path], None]]]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return choose([(name, harm) for name in names for harm in HARMS], count)


def _checkpoints(whole: Path, place: Path, count: int | None) -> Iterator[Result]:
    """The newest checkpoint is damaged: the run goes on from the one before, to the same end."""
    expected = result(whole / "autoencoder")
    for name, harm in _cases(whole / "autoencoder" / "checkpoint-4", count):
        shutil.copytree(whole, place)
        checkpoint = place / "autoencoder" / "checkpoint-4"
        harm(checkpoint / name)
        told = _verify(place / "autoencoder")
        again = train(place, "autoencoder")
        is_aside = (place / "autoencoder" / "incomplete-checkpoint-4").is_dir()
        same = again.status == 0 and result(place / "autoencoder") == expected
        is_ok = same and is_aside and told.status == 1
        outcome = "set aside, bit-equal from the one before" if is_ok else f"exit {again.status}"
        yield Result(f"checkpoint: {harm.__name__} {name}", outcome, is_ok, again.errors[-600:])
        shutil.rmtree(place)


def _autoencoders(whole: Path, place: Path, count: int | None) -> Iterator[Result]:
    """The autoencoder is damaged: refused in one line, or the file has no part in the weights."""
    expected = result(whole / "calm")
    for name, harm in _cases(whole / "autoencoder", count):
        shutil.copytree(whole, place)
        shutil.rmtree(place / "calm")
        harm(place / "autoencoder" / name)
        again = train(place, "calm", _autoencoder_in(place))
        same = again.status == 0 and result(place / "calm") == expected
        outcome = "same weights" if same else "refused" if is_one_line(again) else "other"
        case = f"autoencoder: {harm.__name__} {name}"
        yield Result(case, outcome, same or is_one_line(again), again.errors[-600:])
        shutil.rmtree(place)


def _autoencoder_in(folder: Path) -> str:
    return f"--ae_name_or_path={folder / 'autoencoder'}"


def _verify(folder: Path) -> Ended:
    from calm.cli import main

    return fork(lambda: main(["verify", str(folder)]), folder.parent.parent / "verify.log")
