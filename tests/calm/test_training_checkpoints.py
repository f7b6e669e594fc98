"""Checkpoints: whole or set aside, rotated without loss, resumed to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import MAIN, MODELS, flags, history, logs, make_trainer, train, write_corpus

from calm.errors import UserError
from calm.training.checkpoints import (
    MANIFEST,
    check_usable,
    checkpoint_folders,
    damage,
    discard_checkpoints,
    last_good_checkpoint,
    rotate_checkpoints,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[2]


def make_checkpoint(run, step, *, finished=True):
    folder = run / f"checkpoint-{step}"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "nested" / "optimizer.pt").write_bytes(b"o" * 50)
    if finished:
        write_manifest(folder)
    return folder


def names(run):
    return sorted(folder.name for folder in run.iterdir())


class TestManifest:
    def test_a_finished_checkpoint_is_whole(self, tmp_path):
        folder = make_checkpoint(tmp_path, 10)
        assert damage(folder) is None
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert listed == {"model.safetensors": 100, "nested/optimizer.pt": 50}

    @pytest.mark.parametrize(
        ("harm", "reason"),
        [
            (lambda folder: (folder / MANIFEST).unlink(), "never finished"),
            (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "unreadable"),
            (lambda folder: (folder / MANIFEST).write_text("[]"), "unreadable"),
            (
                lambda folder: (folder / "model.safetensors").unlink(),
                "model.safetensors is missing",
            ),
            (
                lambda folder: os.truncate(folder / "nested" / "optimizer.pt", 20),
                "nested/optimizer.pt holds 20 bytes instead of 50",
            ),
        ],
        ids=["no manifest", "cut manifest", "odd manifest", "missing file", "cut file"],
    )
    def test_damage_is_found_set_aside_and_skipped(self, tmp_path, caplog, harm, reason):
        good, bad = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
        harm(bad)
        assert reason in damage(bad)
        with pytest.raises(UserError, match="checkpoint-10 cannot be used"):
            check_usable(bad)
        assert last_good_checkpoint(tmp_path, set_aside=False) == good
        assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
        assert last_good_checkpoint(tmp_path) == good
        assert names(tmp_path) == ["checkpoint-9", "incomplete-checkpoint-10"]
        assert f"skipping checkpoint {bad}: " in caplog.text and reason in caplog.text

    def test_nothing_whole(self, tmp_path):
        make_checkpoint(tmp_path, 1, finished=False)
        assert last_good_checkpoint(tmp_path) is None
        make_checkpoint(tmp_path, 1, finished=False)  # again, with the first one set aside
        assert last_good_checkpoint(tmp_path) is None
        assert last_good_checkpoint(tmp_path / "nowhere") is None

    def test_order_is_that_of_the_steps(self, tmp_path):
        for step in (100, 20, 3):
            make_checkpoint(tmp_path, step)
        (tmp_path / "checkpoint-best").mkdir()
        found = [folder.name for folder in checkpoint_folders(tmp_path)]
        assert found == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


class TestRotation:
    @pytest.mark.parametrize(
        ("limit", "best", "kept"),
        [
            (None, None, [1, 2, 3, 4]),
            (2, None, [3, 4]),
            (2, 1, [1, 4]),
            (1, 1, [1, 4]),
            (1, 4, [4]),
            (9, 2, [1, 2, 3, 4]),
        ],
    )
    def test_newest_and_best_stay(self, tmp_path, limit, best, kept):
        for step in (1, 2, 3, 4):
            make_checkpoint(tmp_path, step)
        rotate_checkpoints(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
        assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]

    def test_old_checkpoints_go_only_once_the_new_one_is_whole(self, tmp_path, monkeypatch):
        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}

        def disk_is_full(folder):
            if folder.name == "checkpoint-2":
                raise OSError(28, "No space left on device")
            write_manifest(folder)

        monkeypatch.setattr("calm.training.checkpoints.write_manifest", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            train(MODELS["energy"](), tmp_path, **settings)
        assert last_good_checkpoint(tmp_path).name == "checkpoint-1"
        monkeypatch.undo()
        trainer = make_trainer(MODELS["energy"](), tmp_path, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2"]

    def test_best_and_last_are_kept_and_the_best_is_loaded(self, tmp_path, monkeypatch):
        losses = iter([3.0, 1.0, 2.0, 2.5])
        trainer = make_trainer(
            MODELS["energy"](),
            tmp_path,
            max_steps=4,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        evaluate = trainer.evaluation_loop

        def fixed_loss(*args, **kwargs):
            output = evaluate(*args, **kwargs)
            output.metrics["eval_loss"] = next(losses)
            return output

        monkeypatch.setattr(trainer, "evaluation_loop", fixed_loss)
        trainer.train()
        assert [folder.name for folder in checkpoint_folders(tmp_path)] == [
            "checkpoint-2",
            "checkpoint-4",
        ]
        best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
        for name, weight in trainer.model.state_dict().items():
            assert weight.equal(best.state_dict()[name]), name

    def test_a_fresh_start_discards_all(self, tmp_path):
        for step in (1, 2):
            make_checkpoint(tmp_path, step, finished=step == 1)
        (tmp_path / "notes.txt").write_text("mine")
        discard_checkpoints(tmp_path)
        assert names(tmp_path) == ["notes.txt"]


RESUME = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05,
          "sequences": 5, "per_device_train_batch_size": 2}  # fmt: skip


class TestResume:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("step", [2, 4])
    def test_continues_as_if_never_stopped(self, tmp_path, name, step):
        """Across the end of an epoch too: five sequences are three steps."""
        whole = train(MODELS[name](), tmp_path, eval_strategy="steps", eval_steps=3, **RESUME)
        resumed = make_trainer(
            MODELS[name](), tmp_path, eval_strategy="steps", eval_steps=3, **RESUME
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for measure in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            assert history(resumed, measure) == history(whole, measure)
        for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert left.equal(right)


def run_training(stage, *words):
    """The training program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"calm.training.{stage}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--streaming",)], ids=["cached", "streaming"])
def test_a_killed_run_resumes_to_the_bit(tmp_path, extra):
    """kill -9 at an arbitrary moment, then the same command again: the same losses and weights."""
    text = write_corpus(tmp_path)
    length = ("--max_steps=150", "--save_steps=7", "--save_total_limit=2", *extra)
    words = flags(tmp_path, "baseline", *length, text=text)
    folder = tmp_path / "baseline"
    with run_training("train_ar", *words) as process:
        wait_for(lambda: (folder / "checkpoint-21").exists(), process)
        process.send_signal(signal.SIGKILL)
    stopped = last_good_checkpoint(folder, set_aside=False)
    assert stopped is not None and int(stopped.name.split("-")[1]) < 150
    assert MAIN["baseline"](words) == 0
    losses = logs(folder)
    folder.rename(tmp_path / "resumed")
    assert MAIN["baseline"](words) == 0
    assert losses == logs(folder) and len(losses) == 150
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "resumed")]
    assert weights[0] == weights[1]
