"""Checkpoints: whole or set aside, rotated without loss, resumed to the bit."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from forked import start
from safetensors.torch import save_file
from training_cases import MAIN, MODELS, flags, history, logs, make_trainer, train, write_corpus
from transformers import TrainerCallback

from calm.errors import UserError
from calm.integrity import MANIFEST, write_manifest
from calm.training.checkpoints.complete import (
    check_usable,
    checkpoint_damage,
    checkpoint_folders,
    discard_checkpoints,
    last_good_checkpoint,
    rotate_checkpoints,
    set_aside_later,
)


def make_checkpoint(run, step, *, finished=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(25.0)}, folder / "model.safetensors")
    for name in ("config.json", "protocol.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.zeros(9)}, folder / name)
    torch.save({"numpy": np.random.get_state()}, folder / "rng_state.pth")
    if finished:
        write_manifest(folder)
    return folder


def names(run):
    return sorted(folder.name for folder in run.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def listed_anew(harm):
    """Damage that the manifest matches: the files were bad before it was written."""

    def act(folder):
        harm(folder)
        write_manifest(folder)

    return act


HARMS = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "never finished"),
    "cut manifest": (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "unreadable"),
    "odd manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "unreadable"),
    "empty list": (
        lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
        "entries are not those that were written",
    ),
    "a name in the manifest": (
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace("xxh3_128", "xxh3_129", 1)
        ),
        "entries are not those that were written",
    ),
    "a path outside": (
        lambda folder: (folder / MANIFEST).write_text('{"files": {"../x": 1}}'),
        "outside the folder",
    ),
    "missing file": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors is missing",
    ),
    "cut file": (
        lambda folder: os.truncate(folder / "optimizer.pt", 20),
        "optimizer.pt holds 20 bytes instead of",
    ),
    "one bit of the weights": (
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        "the bytes of model.safetensors are not those that were written",
    ),
    "one bit of the state": (
        lambda folder: flip_a_bit(folder / "trainer_state.json"),
        "the bytes of trainer_state.json",
    ),
    "no optimizer, listed so": (
        listed_anew(lambda folder: (folder / "optimizer.pt").unlink()),
        "lists no optimizer.pt",
    ),
    "no schedule, listed so": (
        listed_anew(lambda folder: (folder / "scheduler.pt").unlink()),
        "lists no scheduler.pt",
    ),
    "zeros, listed so": (
        listed_anew(lambda folder: (folder / "optimizer.pt").write_bytes(bytes(100))),
        "optimizer.pt cannot be read",
    ),
    "code in the optimizer, listed so": (
        listed_anew(lambda folder: torch.save(os.getcwd, folder / "optimizer.pt")),
        "optimizer.pt cannot be read (it is damaged, or would run code)",
    ),
    "empty weights, listed so": (
        listed_anew(lambda folder: (folder / "model.safetensors").write_bytes(b"")),
        "model.safetensors cannot be read",
    ),
}


class TestManifest:
    def test_a_finished_checkpoint_is_whole(self, tmp_path):
        folder = make_checkpoint(tmp_path, 10)
        assert checkpoint_damage(folder) is None
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert listed.keys() == {*names(folder)} - {MANIFEST}
        assert listed["config.json"] == {"size": 2, "xxh3_128": xxhash.xxh3_128(b"{}").hexdigest()}

    def test_a_manifest_of_sizes_alone_still_counts(self, tmp_path):
        """As an earlier version wrote it."""
        folder = make_checkpoint(tmp_path, 10)
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        sizes = {name: entry["size"] for name, entry in listed.items()}
        (folder / MANIFEST).write_text(json.dumps({"files": sizes}))
        assert checkpoint_damage(folder) is None
        os.truncate(folder / "optimizer.pt", 20)
        assert "optimizer.pt holds 20 bytes" in checkpoint_damage(folder)

    def test_all_files_get_the_same_mode(self, tmp_path):
        folder = make_checkpoint(tmp_path, 10, finished=False)
        (folder / "optimizer.pt").chmod(0o600)
        write_manifest(folder)
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    def test_a_file_system_without_modes(self, tmp_path, monkeypatch):
        def refuse(path, mode):
            raise PermissionError(1, "Operation not permitted", str(path))

        monkeypatch.setattr(Path, "chmod", refuse)
        assert checkpoint_damage(make_checkpoint(tmp_path, 10)) is None

    @pytest.mark.parametrize("name", HARMS)
    def test_damage_is_found_set_aside_and_skipped(self, tmp_path, caplog, name):
        harm, reason = HARMS[name]
        good, bad = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
        harm(bad)
        assert reason in checkpoint_damage(bad)
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
        make_checkpoint(tmp_path, 1, finished=False)  # again: what was set aside stays
        assert last_good_checkpoint(tmp_path) is None
        assert names(tmp_path) == ["incomplete-checkpoint-1", "incomplete-checkpoint-1-2"]
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

        monkeypatch.setattr("calm.training.checkpoints.complete.write_manifest", disk_is_full)
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

    def test_a_damaged_best_checkpoint_is_not_loaded(self, tmp_path):
        settings = {
            "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "load_best_model_at_end": True,
        }  # fmt: skip
        trainer = train(MODELS["energy"](), tmp_path, **settings)
        last = str(tmp_path / "checkpoint-2")
        flip_a_bit(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        for steps in (2, 3):
            trainer = make_trainer(MODELS["energy"](), tmp_path, **settings, max_steps=steps)
            with pytest.raises(UserError, match=r"load_best_model_at_end: .* the bytes of model"):
                trainer.train(resume_from_checkpoint=last)

    def test_a_best_checkpoint_that_was_damaged_meanwhile(self, tmp_path):
        class Damages(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    flip_a_bit(tmp_path / "checkpoint-1" / "model.safetensors")

        settings = {
            "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 1e-2,
            "metric_for_best_model": "loss",
        }  # fmt: skip
        trainer = make_trainer(MODELS["baseline"](), tmp_path, **settings)
        trainer.add_callback(Damages())
        with pytest.raises(UserError, match=r"checkpoint-1 cannot be loaded"):
            trainer.train()

    def test_a_fresh_start_discards_all(self, tmp_path):
        for step in (1, 2):
            make_checkpoint(tmp_path, step, finished=step == 1)
        (tmp_path / "notes.txt").write_text("mine")
        discard_checkpoints(tmp_path)
        assert names(tmp_path) == ["notes.txt"]

    def test_only_what_a_run_wrote_is_deleted(self, tmp_path):
        """A link, or a file of the user's, in any checkpoint: nothing is touched."""
        run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        make_checkpoint(run, 1)
        make_checkpoint(elsewhere, 2)
        (run / "checkpoint-2").symlink_to(elsewhere / "checkpoint-2")
        with pytest.raises(UserError, match=r"would delete .*checkpoint-2, but it is a link"):
            discard_checkpoints(run)
        (run / "checkpoint-2").unlink()
        (run / "checkpoint-2").mkdir()
        (run / "checkpoint-2" / "thesis.tex").write_text("mine")
        with pytest.raises(UserError, match=r"thesis\.tex in it was not written by a training run"):
            discard_checkpoints(run)
        assert names(run) == ["checkpoint-1", "checkpoint-2"]
        assert checkpoint_damage(elsewhere / "checkpoint-2") is None

    def test_a_checkpoint_under_a_later_name_is_not_set_aside(self, tmp_path):
        for step in (6, 8):
            (make_checkpoint(tmp_path, step) / "trainer_state.json").write_text(
                '{"global_step": 6}'
            )
        (tmp_path / "checkpoint-99").symlink_to(tmp_path / "checkpoint-6")
        set_aside_later(tmp_path, tmp_path / "checkpoint-99")
        assert names(tmp_path) == ["checkpoint-6", "checkpoint-99", "later-checkpoint-8"]

    def test_files_of_any_tokenizer_are_of_the_run(self, tmp_path):
        """Names that no list of ours knows, but the manifest does; one that came later is kept."""
        for step in (1, 2, 3):
            folder = make_checkpoint(tmp_path, step, finished=False)
            (folder / "additional_chat_templates").mkdir()
            for name in ("spm.model", "tokenization_own.py", "additional_chat_templates/tools"):
                (folder / name).write_text("x")
            write_manifest(folder)
        (tmp_path / "checkpoint-2" / "notes.py").write_text("mine")
        rotate_checkpoints(tmp_path, 1, None)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    def test_rotation_follows_no_link(self, tmp_path, caplog):
        run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        make_checkpoint(elsewhere, 1)
        run.mkdir()
        (run / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
        for step in (2, 3):
            make_checkpoint(run, step)
        rotate_checkpoints(run, 1, None)
        assert names(run) == ["checkpoint-1", "checkpoint-3"]
        assert checkpoint_damage(elsewhere / "checkpoint-1") is None
        assert "keeping" in caplog.text and "it is a link" in caplog.text


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


def wait_for(condition, process, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--streaming",)], ids=["cached", "streaming"])
def test_a_killed_run_resumes_to_the_bit(tmp_path, extra):
    """kill -9 at an arbitrary moment, then the same command again: the same losses and weights."""
    text = write_corpus(tmp_path)
    length = ("--max_steps=150", "--save_steps=7", "--save_total_limit=2", *extra)
    words = flags(tmp_path, "baseline", *length, text=text)
    folder, log = tmp_path / "baseline", tmp_path / "log"
    process = start(log, MAIN["baseline"], words)
    try:
        wait_for(lambda: (folder / "checkpoint-21").exists(), process, log)
    finally:
        process.kill()
        process.join()
    stopped = last_good_checkpoint(folder, set_aside=False)
    assert stopped is not None and int(stopped.name.split("-")[1]) < 150
    assert MAIN["baseline"](words) == 0
    losses = logs(folder)
    folder.rename(tmp_path / "resumed")
    assert MAIN["baseline"](words) == 0
    assert losses == logs(folder) and len(losses) == 150
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "resumed")]
    assert weights[0] == weights[1]
