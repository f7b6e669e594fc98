"""A job takes over a run only with the same settings, or with changes that were allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import MAIN, SIZES, flags, logs, write_corpus

from calm.cli import main as cli
from calm.errors import UserError
from calm.integrity import write_manifest
from calm.training.checkpoints.complete import checkpoint_folders, last_good_checkpoint
from calm.training.checkpoints.lock import LOCK, locked
from calm.training.checkpoints.resume import Takeover, read_protocol

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path)


@pytest.fixture
def run(tmp_path, text, capsys):
    """Train a stage in its folder: exit status and what went to standard error."""

    def start(stage, *extra):
        status = MAIN[stage](flags(tmp_path, stage, *extra, text=text))
        return status, capsys.readouterr().err

    return start


# A flag that changes the numbers of a run -> what the refusal names.
CHANGES = {
    "--learning_rate=3e-3": "learning_rate was 0.01, is 0.003",
    "--weight_decay=0.5": "weight_decay was 0.0, is 0.5",
    "--lr_scheduler_type=constant": "lr_scheduler_type was 'linear', is 'constant'",
    "--warmup_steps=3": "warmup_steps was 0, is 3",
    "--max_grad_norm=3": "max_grad_norm was 1.0, is 3.0",
    "--seed=7": "seed was 42, is 7",
    "--block_size=64": "block_size was 32, is 64",
    "--per_device_train_batch_size=3": "sequences_per_step was 2, is 3",
    "--gradient_accumulation_steps=2": "sequences_per_step was 2, is 4",
    "--max_train_samples=5": "train.data_hash was",
    "--streaming": "train.streaming was False, is True",
    "--dataloader_drop_last": "dataloader_drop_last was False, is True",
    "--neftune_noise_alpha=5": "neftune_noise_alpha was None, is 5.0",
    "--train_sampling_strategy=sequential": "train_sampling_strategy was 'random'",
    "--ignore_data_skip": "ignore_data_skip was False, is True",
    "--validation_split_percentage=30": "validation_split_percentage was 20.0, is 30.0",
    f"--config_overrides={SIZES['autoencoder']},kl_weight=0.5": "model.kl_weight was 0.001, is 0.5",
    f"--config_overrides={SIZES['autoencoder']},ae_dropout=0": "model.ae_dropout was 0.15, is 0",
}
# A flag that makes other weights -> what the refusal names.
CONFLICTS = {
    "--tokenizer_name=bpe:300": "tokenizer_hash was",
    "--optim=sgd": "optimizer was",
    "--muon_learning_rate=0.01": "optimizer was",
    "--config_overrides=hidden_size=24,intermediate_size=24,latent_size=8":
        "model.hidden_size was 16, is 24",
    "--config_overrides=hidden_size=16,intermediate_size=24,latent_size=8,num_decoder_layers=4":
        "model.num_decoder_layers was 2, is 4",
    "--config_overrides=hidden_size=16,intermediate_size=24,latent_size=8,patch_size=2":
        "patch_size was 4, is 2",
}  # fmt: skip


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_other_settings_are_refused_and_change_nothing(tmp_path, run):
    assert run("autoencoder")[0] == 0
    before = files(tmp_path / "autoencoder")
    for flag, complaint in CHANGES.items():
        status, error = run("autoencoder", "--max_steps=6", flag)
        assert status == 2 and complaint in error, (flag, error)
        assert "--allow_changes" in error and error.count("error: ") == 1
    for flag, complaint in CONFLICTS.items():
        for more in ((), ("--allow_changes",)):
            status, error = run("autoencoder", "--max_steps=6", flag, *more)
            assert status == 2 and complaint in error, (flag, error)
            assert "--overwrite_output_dir" in error and error.count("error: ") == 1
    assert files(tmp_path / "autoencoder") == before


def test_arguments_of_the_schedule_that_are_new(run):
    """None and a mapping are two values, although one has no entries."""
    schedule = "--lr_scheduler_type=polynomial"
    assert run("autoencoder", schedule)[0] == 0
    status, error = run("autoencoder", schedule, '--lr_scheduler_kwargs={"power": 3}')
    assert status == 2 and "lr_scheduler_kwargs was None, is {'power': 3}" in error


def test_a_rate_that_follows_the_losses_is_kept(tmp_path, run):
    """Another one cannot be worked out; other settings of the optimizer can change."""
    evaluates = ("--do_train", "--do_eval", "--eval_strategy=steps", "--eval_steps=2")
    follows = ("--lr_scheduler_type=reduce_lr_on_plateau", "--metric_for_best_model=loss")
    follows += evaluates
    assert run("autoencoder", *follows)[0] == 0
    longer = (*follows, "--max_steps=6", "--allow_changes")
    for flag in ("--learning_rate=1e-5", "--lr_scheduler_type=linear"):
        status, error = run("autoencoder", *longer, flag)
        assert status == 2 and flag.partition("=")[0][2:] + " was" in error, error
    assert run("autoencoder", *longer, "--weight_decay=0.5")[0] == 0
    path = tmp_path / "autoencoder" / "checkpoint-6" / "optimizer.pt"
    groups = torch.load(path, weights_only=True)["param_groups"]
    assert (groups[0]["weight_decay"], groups[0]["lr"]) == (0.5, 0.01)


def test_more_steps_and_other_logs_are_no_change(run):
    assert run("autoencoder")[0] == 0
    more = ("--max_steps=6", "--logging_steps=3", "--save_steps=3", "--save_total_limit=1")
    assert run("autoencoder", *more)[0] == 0


def test_allowed_changes_are_honoured_and_recorded(tmp_path, run):
    """A learning rate of 0 leaves the weights as they are; both values are in the protocol."""
    constant = "--lr_scheduler_type=constant"
    assert run("autoencoder", constant)[0] == 0
    changed = (constant, "--max_steps=6", "--learning_rate=0", "--allow_changes")
    status, error = run("autoencoder", *changed)
    assert status == 0, error
    folder = tmp_path / "autoencoder"
    assert logs(folder, "learning_rate") == [0.01] * 4 + [0.0] * 2
    weights = [folder / f"checkpoint-{step}" / "model.safetensors" for step in (4, 6)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    record = {"step": 4, "training.learning_rate": {"from": 0.01, "to": 0.0}}
    assert read_protocol(folder)["changes"] == [record]
    assert run("autoencoder", *changed[:-1], "--max_steps=8")[0] == 0  # now the run's own setting
    assert read_protocol(folder)["changes"] == [record]


def test_a_new_rate_scales_the_schedule_where_it_stands(tmp_path, run):
    assert run("autoencoder", "--max_steps=8", "--max_train_samples=16")[0] == 0
    (tmp_path / "autoencoder" / "checkpoint-8" / "manifest.json").unlink()
    (tmp_path / "autoencoder" / "checkpoint-6" / "manifest.json").unlink()
    changed = ("--max_steps=8", "--max_train_samples=16", "--learning_rate=2e-2", "--allow_changes")
    assert run("autoencoder", *changed)[0] == 0
    rates = logs(tmp_path / "autoencoder", "learning_rate")
    expected = [0.01 * (1 - step / 8) * (2 if step >= 4 else 1) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_a_trained_tokenizer_is_that_of_the_checkpoint(tmp_path, run, text):
    """Lines appended to the text would give other ids the same numbers."""
    words = ("--tokenizer_name=bpe:300", "--validation_split_percentage=0")
    assert run("autoencoder", *words)[0] == 0
    first = read_protocol(tmp_path / "autoencoder")
    with open(text, "a") as handle:
        handle.write((json.dumps({"text": "quite other words zzz " * 9}) + "\n") * 99)
    status, error = run("autoencoder", *words, "--max_steps=6")
    assert status == 2 and "train.data_hash was" in error and "tokenizer_hash" not in error
    assert run("autoencoder", *words, "--max_steps=6", "--allow_changes")[0] == 0
    assert read_protocol(tmp_path / "autoencoder")["tokenizer_hash"] == first["tokenizer_hash"]
    status, error = run("autoencoder", "--tokenizer_name=bpe:310", *words[1:], "--max_steps=8")
    assert status == 2 and "tokenizer_hash was" in error


def test_a_folder_of_a_prepared_text(tmp_path, run):
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "prepared.json").write_text("{}")
    status, error = run("autoencoder", f"--output_dir={folder}")
    assert status == 2 and f"output_dir: {folder} holds a prepared text" in error
    assert [path.name for path in folder.iterdir()] == ["prepared.json"]


def test_a_folder_of_another_stage(tmp_path, run):
    assert run("autoencoder")[0] == 0
    folder = tmp_path / "autoencoder"
    before = files(folder)
    status, error = run("baseline", f"--output_dir={folder}")
    assert status == 2 and "holds a model of stage 'autoencoder'" in error
    status, error = run("calm", f"--ae_name_or_path={folder}", f"--output_dir={folder}/.")
    assert status == 2 and "is ae_name_or_path" in error
    assert files(folder) == before


def test_the_stage_is_that_of_the_newest_checkpoint(tmp_path, run):
    """A run that begins afresh where another stage was finished, and is killed, can go on."""
    folder = tmp_path / "shared"
    assert run("autoencoder", f"--output_dir={folder}")[0] == 0
    finished = (folder / "protocol.json").read_bytes()
    assert run("baseline", f"--output_dir={folder}", "--overwrite_output_dir")[0] == 0
    (folder / "protocol.json").write_bytes(finished)
    assert run("baseline", f"--output_dir={folder}", "--max_steps=6")[0] == 0
    (folder / "protocol.json").write_bytes(bytes(9))
    assert run("baseline", f"--output_dir={folder}", "--max_steps=8")[0] == 0


def test_a_checkpoint_of_any_name(tmp_path, run):
    assert run("autoencoder")[0] == 0
    kept = tmp_path / "best-so-far"
    (tmp_path / "autoencoder" / "checkpoint-2").rename(kept)
    words = (f"--resume_from_checkpoint={kept}", f"--output_dir={tmp_path / 'other'}")
    status, error = run("autoencoder", *words, "--learning_rate=1e-3")
    assert status == 2 and "from step 2" in error
    assert run("autoencoder", *words)[0] == 0
    assert logs(tmp_path / "other") == logs(tmp_path / "autoencoder")


def test_checkpoints_of_another_course_are_set_aside(tmp_path, run):
    """Back to an earlier checkpoint: later ones neither stay the newest nor cost the new ones."""
    folder = tmp_path / "autoencoder"
    assert run("autoencoder", "--max_steps=8")[0] == 0
    slower = ("--learning_rate=1e-3", "--save_total_limit=1")
    first = f"--resume_from_checkpoint={folder / 'checkpoint-2'}"
    status, _ = run("autoencoder", *slower, first, "--max_steps=6")
    assert status == 2 and (folder / "checkpoint-8").is_dir()
    assert run("autoencoder", *slower, first, "--max_steps=6", "--allow_changes")[0] == 0
    assert [path.name for path in checkpoint_folders(folder)] == ["checkpoint-6"]
    assert {path.name for path in folder.glob("later-*")} == {
        f"later-checkpoint-{step}" for step in (4, 6, 8)
    }
    assert run("autoencoder", *slower, "--max_steps=8")[0] == 0


@pytest.mark.parametrize("callback", ["MeanLoss", "TrainingClock"])
def test_a_checkpoint_that_knows_less(tmp_path, run, callback):
    """As an earlier version wrote it, or a run that counted steps instead of seconds."""
    folder = tmp_path / "autoencoder"
    assert run("autoencoder")[0] == 0
    state = folder / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["stateful_callbacks"].pop(callback, None)
    state.write_text(json.dumps(content))
    write_manifest(folder / "checkpoint-4")
    timed = ("--max_train_seconds=60",) if callback == "TrainingClock" else ()
    assert run("autoencoder", "--max_steps=6", *timed)[0] == 0
    assert callback in json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]


def test_verify_names_what_is_damaged(tmp_path, run, capsys):
    """In a run's folder, in the one above it, and nowhere else."""
    assert run("autoencoder")[0] == 0
    folder = tmp_path / "autoencoder"
    for place in (folder, tmp_path):
        assert cli(["verify", str(place)]) == 0
        assert capsys.readouterr().out.count("  whole") == 3  # two checkpoints and the model
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert cli(["verify", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert line.startswith(f"{folder} ") and "the bytes of model.safetensors are not" in line
    assert cli(["verify", str(tmp_path / "cache")]) == 2


def test_weights_alone_are_no_damage(tmp_path, run):
    """No run can go on from them; neither are they set aside, nor trained over."""
    assert run("autoencoder", "--save_only_model")[0] == 0
    folder = tmp_path / "autoencoder"
    assert cli(["verify", str(folder)]) == 0
    before = files(folder)
    status, error = run("autoencoder", "--save_only_model", "--max_steps=6")
    assert status == 2 and "checkpoint-4 holds weights alone (save_only_model)" in error
    assert files(folder) == before


def test_what_a_job_reads_is_not_deleted(tmp_path, run):
    assert run("autoencoder")[0] == 0
    folder = tmp_path / "autoencoder"
    before = files(folder)
    first = folder / "checkpoint-2"
    words = (f"--output_dir={folder}", "--overwrite_output_dir")
    for stage, flag in (("autoencoder", "model_name_or_path"), ("calm", "ae_name_or_path")):
        status, error = run(stage, *words, f"--{flag}={first}")
        assert status == 2 and f"{flag} is in it" in error
    assert files(folder) == before


def test_another_autoencoder_of_the_same_shape(tmp_path, run):
    for name, seed in (("first", 1), ("second", 2)):
        assert run("autoencoder", f"--output_dir={tmp_path / name}", f"--seed={seed}")[0] == 0
    assert run("calm", f"--ae_name_or_path={tmp_path / 'first'}")[0] == 0
    status, error = run("calm", f"--ae_name_or_path={tmp_path / 'second'}", "--max_steps=6")
    assert status == 2 and "autoencoder was" in error and "--allow_changes" not in error


@pytest.mark.parametrize("streams", [False, True])
def test_the_same_batch_cut_otherwise(tmp_path, run, streams):
    """Four sequences a step, as 4, as 2 x 2: the same losses; a stream is not compared so."""
    extra = ("--streaming",) if streams else ("--max_train_samples=12",)
    whole = ("--per_device_train_batch_size=4", *extra)
    assert run("autoencoder", *whole, "--max_steps=8")[0] == 0
    expected = logs(tmp_path / "autoencoder")
    for step in (6, 8):
        (tmp_path / "autoencoder" / f"checkpoint-{step}" / "manifest.json").unlink()
    cut = ("--gradient_accumulation_steps=2", *extra, "--max_steps=8")
    status, error = run("autoencoder", *cut)
    if streams:
        assert status == 2 and "batch, accumulation, processes was [4, 1, 1]" in error
    else:
        assert status == 0, error
        assert logs(tmp_path / "autoencoder") == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_stream_goes_on_with_other_workers(tmp_path, run):
    """In the middle of it, to the bit; lanes decide the order and stay."""
    lanes = ("--streaming", "--stream_lanes=3", "--max_steps=8")
    assert run("autoencoder", *lanes)[0] == 0
    expected, folder = logs(tmp_path / "autoencoder"), tmp_path / "autoencoder"
    for step in (4, 6, 8):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
    status, error = run("autoencoder", *lanes[::2], "--stream_lanes=2")
    assert status == 2 and "train.lanes was 3, is 2" in error
    workers = ("--dataloader_num_workers=2", '--accelerator_config={"dispatch_batches": false}')
    assert run("autoencoder", *lanes, *workers)[0] == 0
    assert logs(folder) == expected and len(expected) == 8


def test_weights_that_became_infinite_are_not_saved(tmp_path, run):
    assert run("autoencoder")[0] == 0
    words = ("--learning_rate=1e39", "--max_steps=5", "--save_steps=1", "--allow_changes")
    status, error = run("autoencoder", *words)
    assert status == 2 and "is not finite after step 5" in error
    folder = tmp_path / "autoencoder"
    good = last_good_checkpoint(folder)
    assert good == folder / "checkpoint-4" and f"last good checkpoint is {good}" in error
    assert run("autoencoder", "--learning_rate=1e-3", "--max_steps=6", "--allow_changes")[0] == 0


def test_no_space_is_one_line_with_what_is_needed(tmp_path, run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    status, error = run("autoencoder")
    assert status == 2 and "saving needs" in error and "0.0 MB are free" in error
    assert error.count("error: ") == 1 and "Traceback" not in error


class TestLock:
    def test_the_second_is_refused_and_nothing_stays(self, tmp_path):
        folder = tmp_path / "new" / "run"
        with locked(folder):
            complaint = r"another run is writing to .*run .this process"
            with pytest.raises(UserError, match=complaint), locked(folder):
                pass
            code = (
                "import sys, pathlib, calm.training.checkpoints.lock as lock\n"
                "with lock.locked(pathlib.Path(sys.argv[1])): pass"
            )
            command = [sys.executable, "-c", code, str(folder)]
            other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert f"process {os.getpid()} on" in other.stderr
        assert not (tmp_path / "new").exists()

    def test_one_whose_process_is_gone_is_free(self, tmp_path):
        (tmp_path / LOCK).write_text('{"host": "here", "pid": 1}')
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()


def test_a_weight_of_another_shape_is_named(tmp_path, run):
    """Where no setting tells, as between versions, the shapes do."""
    assert run("autoencoder")[0] == 0
    checkpoint = tmp_path / "autoencoder" / "checkpoint-4"
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"weight bias was None, is \[2\]"):
        Takeover.check(checkpoint, {}, model, allow_changes=True)
