"""Whole jobs through the entry points: what they write, and one clear error for each bad input."""

import json
import logging
import os
import shutil
from unittest.mock import Mock

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from training_cases import MAIN, SIZES, flags, logs, write_corpus
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from calm import Autoencoder, BaselineTransformer, EnergyTransformer, FlowTransformer
from calm.training.checkpoints.complete import checkpoint_folders
from calm.training.trainer import CALMTrainer


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Folder of an autoencoder that was trained for four steps."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert MAIN["autoencoder"](flags(folder, "autoencoder", "--do_train", "--do_eval")) == 0
    return folder / "autoencoder"


@pytest.fixture
def run(tmp_path, autoencoder, capsys):
    """Run a stage; its exit status and what it says on stderr last."""

    def run(stage, *extra, text=None):
        own = [f"--ae_name_or_path={autoencoder}"] if stage == "calm" else []
        status = MAIN[stage](flags(tmp_path, stage, *own, *extra, text=text))
        return status, capsys.readouterr().err

    return run


def read(path):
    return json.loads(path.read_text())


class TestResults:
    def test_autoencoder(self, autoencoder):
        model = Autoencoder.from_pretrained(autoencoder)
        tokenizer = AutoTokenizer.from_pretrained(autoencoder)
        assert model.config.vocab_size == len(tokenizer) == 259
        assert model.config.pad_token_id == tokenizer.pad_token_id
        results = read(autoencoder / "all_results.json")
        assert {"train_loss", "eval_loss", "eval_accuracy", "eval_kl", "eval_collapsed"} <= set(
            results
        )
        protocol = read(autoencoder / "protocol.json")
        assert (protocol["stage"], protocol["block_size"]) == ("autoencoder", 32)
        assert (
            protocol["train_files"] == ["text.jsonl"] and len(protocol["train"]["data_hash"]) == 32
        )
        assert protocol["training"]["learning_rate"] == 0.01

    def test_nothing_saved_names_a_path_of_this_machine(self, autoencoder):
        files = [path for path in autoencoder.rglob("*") if path.is_file()]
        assert len(files) > 20
        for path in files:
            assert str(autoencoder.parent).encode() not in path.read_bytes(), path

    def test_language_model_stands_alone(self, tmp_path, run, autoencoder):
        status, _ = run("calm", "--eval_strategy=steps", "--eval_steps=2", "--eval_num_samples=3")
        assert status == 0
        folder = tmp_path / "calm"
        model = EnergyTransformer.from_pretrained(folder)
        trained = Autoencoder.from_pretrained(autoencoder)
        for name, weight in trained.state_dict().items():
            assert model.ae_model.state_dict()[name].equal(weight)
        assert AutoConfig.from_pretrained(folder).model_type == "calm"
        assert len(logs(folder, "eval_brier_lm")) == 2 and len(logs(folder, "fidelity")) == 4
        assert "eval_brier_lm" in read(folder / "eval_results.json")
        for checkpoint in checkpoint_folders(folder):
            assert EnergyTransformer.from_pretrained(checkpoint).config.ae_path is None
            assert (checkpoint / "protocol.json").is_file()
            assert len(AutoTokenizer.from_pretrained(checkpoint)) == 259

    @pytest.mark.parametrize("how", ["--model_type=flow", "--config_overrides=model_type=flow,"])
    def test_head_is_chosen_by_flag_or_override(self, tmp_path, run, how):
        words = [how + SIZES["calm"]] if "overrides" in how else [how]
        assert run("calm", *words, "--max_steps=1")[0] == 0
        assert FlowTransformer.from_pretrained(tmp_path / "calm").config.head_type == "flow"

    def test_baseline_with_a_tokenizer_made_on_the_spot(self, tmp_path, run):
        words = ["--tokenizer_name=bpe:280", "--do_train", "--do_eval", "--streaming"]
        assert run("baseline", *words)[0] == 0
        model = BaselineTransformer.from_pretrained(tmp_path / "baseline")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baseline")
        assert 259 < model.config.vocab_size == len(tokenizer) <= 280
        assert read(tmp_path / "baseline" / "protocol.json")["train"]["streaming"]

    def test_going_on_from_weights(self, tmp_path, run):
        assert run("calm")[0] == 0
        shutil.move(tmp_path / "calm", tmp_path / "first")
        words = [
            f"--model_name_or_path={tmp_path / 'first'}",
            "--learning_rate=0",
            "--config_overrides=",
        ]
        assert run("calm", *words)[0] == 0
        models = (EnergyTransformer.from_pretrained(tmp_path / name) for name in ("first", "calm"))
        pairs = zip(*(model.parameters() for model in models), strict=True)
        assert all(before.equal(after) for before, after in pairs)

    def test_evaluation_alone(self, tmp_path, run):
        assert run("baseline", "--do_train", "--do_eval")[0] == 0
        expected = read(tmp_path / "baseline" / "eval_results.json")
        only = [
            f"--model_name_or_path={tmp_path / 'baseline'}",
            f"--output_dir={tmp_path / 'again'}",
        ]
        assert run("baseline", "--do_eval", "--config_overrides=", *only)[0] == 0
        again = read(tmp_path / "again" / "eval_results.json")
        for name in ("eval_loss", "eval_brier1", "eval_brier_lm"):
            assert again[name] == expected[name]
        assert not (tmp_path / "again" / "train_results.json").exists()

    def test_bfloat16_weights(self, tmp_path, run):
        assert run("autoencoder", "--torch_dtype=bfloat16", "--max_steps=1")[0] == 0
        assert Autoencoder.from_pretrained(tmp_path / "autoencoder").dtype == torch.bfloat16


START = f"--config_overrides={SIZES['calm']},has_start_patch=true"


class TestStartPatch:
    """The language model alone has one; it reads the same documents."""

    @pytest.mark.parametrize("source", ["--streaming=false", "--streaming"])
    def test_start_chunks_reach_the_model(self, tmp_path, run, monkeypatch, source):
        batches, compute_loss = [], CALMTrainer.compute_loss

        def spy(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return compute_loss(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(CALMTrainer, "compute_loss", spy)
        assert run("calm", START, source)[0] == 0
        model = EnergyTransformer.from_pretrained(tmp_path / "calm")
        assert (model.config.has_start_patch, model.start_token_id) == (True, 256)
        assert read(tmp_path / "calm" / "protocol.json")["start_token_id"] == 256
        inputs, labels = (
            torch.cat([batch[name] for batch in batches]).unflatten(1, (-1, 4))
            for name in ("input_ids", "labels")
        )
        is_text = inputs[..., 0] != 258  # the last block is padded
        inputs, labels = inputs[is_text], labels[is_text]
        is_start = (inputs == 256).all(-1)
        assert is_start.any() and not (inputs[~is_start] == 256).any()
        assert (labels[is_start] == -100).all() and (labels[~is_start][:, 0] >= 0).all()
        has_label = labels >= 0
        assert torch.equal(labels[has_label], inputs[has_label])

    def test_a_stopped_run_goes_on_to_the_bit(self, tmp_path, run):
        folder = tmp_path / "calm"
        assert run("calm", START)[0] == 0
        weights, losses = (folder / "model.safetensors").read_bytes(), logs(folder)
        shutil.rmtree(folder / "checkpoint-4")
        assert run("calm", START)[0] == 0
        assert (folder / "model.safetensors").read_bytes() == weights and logs(folder) == losses

    def test_autoencoder_and_baseline_have_none(self, tmp_path, run, autoencoder):
        assert read(autoencoder / "protocol.json")["start_token_id"] is None
        assert run("baseline")[0] == 0
        assert read(tmp_path / "baseline" / "protocol.json")["start_token_id"] is None

    def test_a_tokenizer_without_begin_token(self, tmp_path, run):
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "#": 2}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="</s>", pad_token="#", unk_token="<unk>"
        )
        tokenizer.save_pretrained(tmp_path / "t")
        named = f"--tokenizer_name={tmp_path / 't'}"
        assert_one_error(
            *run("calm", START, named), "has_start_patch needs bos_token_id", "add_special_tokens"
        )
        assert run("calm", named, "--max_steps=1")[0] == 0


class TestStartingAgain:
    def test_a_finished_run_stays_as_it_is(self, tmp_path, run):
        folder = tmp_path / "baseline"
        assert run("baseline")[0] == 0
        weights, losses = (folder / "model.safetensors").read_bytes(), logs(folder)
        assert run("baseline")[0] == 0
        assert (folder / "model.safetensors").read_bytes() == weights and logs(folder) == losses

    def test_a_longer_run_goes_on_from_the_last_checkpoint(self, tmp_path, run, caplog):
        assert run("baseline")[0] == 0
        with caplog.at_level(logging.INFO, logger="calm"):
            assert run("baseline", "--max_steps=6")[0] == 0
        assert f"resuming from {tmp_path / 'baseline' / 'checkpoint-4'}" in caplog.text
        assert len(logs(tmp_path / "baseline")) == 6

    def test_a_damaged_checkpoint_is_passed_over(self, tmp_path, run, caplog):
        folder = tmp_path / "baseline"
        assert run("baseline")[0] == 0
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
        assert run("baseline")[0] == 0
        assert "skipping checkpoint" in caplog.text and "optimizer.pt holds 3 bytes" in caplog.text
        assert (folder / "incomplete-checkpoint-4").is_dir() and (folder / "checkpoint-4").is_dir()
        assert (folder / "model.safetensors").read_bytes() == whole and len(logs(folder)) == 4

    def test_overwriting_starts_at_the_beginning(self, tmp_path, run):
        assert run("baseline")[0] == 0
        assert run("baseline", "--overwrite_output_dir", "--max_steps=2", "--save_steps=1")[0] == 0
        found = [folder.name for folder in checkpoint_folders(tmp_path / "baseline")]
        assert found == ["checkpoint-1", "checkpoint-2"] and len(logs(tmp_path / "baseline")) == 2

    def test_a_named_checkpoint(self, tmp_path, run):
        assert run("baseline")[0] == 0
        first = tmp_path / "baseline" / "checkpoint-2"
        assert run("baseline", f"--resume_from_checkpoint={first}")[0] == 0
        (first / "model.safetensors").write_bytes(b"cut")
        status, error = run("baseline", f"--resume_from_checkpoint={first}")
        assert status == 2 and "model.safetensors holds 3 bytes" in error

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--resume_from_checkpoint=nowhere"], "there is no folder nowhere"),
            (["--resume_from_checkpoint=True"], "holds no good checkpoint"),
            (["--resume_from_checkpoint=True", "--overwrite_output_dir"], "exclude each other"),
        ],
    )
    def test_nothing_to_resume(self, run, words, complaint):
        status, error = run("baseline", *words)
        assert status == 2 and complaint in error


def assert_one_error(status, error, *parts):
    """Status 2, and a last line that says what is wrong; no traceback."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error
    for part in parts:
        assert part in lines[0], lines[0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("stage", "words", "parts"),
        [
            ("calm", ["--block_size=30"], ["block_size must be a multiple of patch_size (K=4)"]),
            (
                "calm",
                ["--ae_name_or_path=nowhere"],
                ["ae_name_or_path: cannot load a tokenizer from 'nowhere'"],
            ),
            ("calm", ["--ae_name_or_path="], ["needs a trained autoencoder: pass ae_name_or_path"]),
            ("calm", ["--config_overrides=patch_size=2"], ["patch_size", "2", "4"]),
            ("calm", ["--config_overrides=latent_size=16"], ["latent_size", "16", "8"]),
            ("calm", ["--config_overrides=vocab_size=300"], ["vocab_size", "300", "259"]),
            ("calm", ["--config_overrides=beta=2"], ["beta must lie in (0, 2)"]),
            ("calm", ["--config_overrides=num_samples=1"], ["num_samples must be at least 2"]),
            ("calm", ["--config_overrides=hiden_size=8"], ["no field 'hiden_size'", "hidden_size"]),
            (
                "calm",
                ["--model_type=gan"],
                ["model_type must be one of energy, diffusion, flow", "gan"],
            ),
            (
                "calm",
                ["--model_name_or_path=nowhere"],
                ["model_name_or_path: cannot load a tokenizer from 'nowhere'"],
            ),
            ("calm", ["--learning_rat=1"], ["unknown flag", "did you mean --learning_rate"]),
            ("autoencoder", ["--max_train_samples=0"], ["max_train_samples must be at least 1"]),
            ("autoencoder", ["--torch_dtype=float8"], ["torch_dtype must be auto, float32"]),
            ("autoencoder", ["--config_name=nowhere"], ["config_name: cannot load 'nowhere'"]),
            ("baseline", ["--train_file=nowhere.txt"], ["train_file: no file matches 'nowhere."]),
            (
                "baseline",
                ["--tokenizer_name=nowhere"],
                ["tokenizer_name: cannot load a tokenizer from 'nowhere'"],
            ),
            ("baseline", ["--tokenizer_name="], ["tokenizer_name is needed"]),
            (
                "baseline",
                ["--do_train", "--do_eval", "--validation_split_percentage=0"],
                ["text to evaluate on"],
            ),
            ("baseline", ["--config_overrides=vocab_size=100"], ["259 entries", "only 100"]),
        ],
        ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else value,
    )
    @pytest.mark.usefixtures("offline")
    def test_settings(self, run, stage, words, parts):
        assert_one_error(*run(stage, *words), *parts)

    @pytest.fixture
    def offline(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ('{"text": "x"}\nno json\n', "text.jsonl:2: not JSON"),
            ('{"body": "x"}\n', 'text.jsonl:1: no "text" key (keys: body)'),
            ("", "text.jsonl is empty"),
            ('{"text": ""}\n', "text.jsonl: holds no document"),
        ],
    )
    def test_text(self, tmp_path, run, content, part):
        text = tmp_path / "text.jsonl"
        text.write_text(content)
        assert_one_error(*run("autoencoder", text=str(text)), part)

    def test_weights_of_another_kind(self, tmp_path, run):
        assert run("baseline", "--max_steps=1")[0] == 0
        error = run("calm", f"--ae_name_or_path={tmp_path / 'baseline'}")
        assert_one_error(*error, "ae_name_or_path:", "kind 'baseline'", "it loads autoencoder")

    def test_tokenizer_of_another_autoencoder(self, tmp_path, run):
        error = run("calm", "--tokenizer_name=bpe:300", "--block_size=16")
        assert_one_error(*error, "the tokenizer needs ", "the language model only 259")

    @pytest.mark.parametrize(
        ("special", "part"),
        [
            ({}, "has no end token"),
            ({"eos_token": "</s>"}, "has no pad token, and add_pad_token is off"),
        ],
    )
    def test_tokenizer_without_special_tokens(self, tmp_path, run, special, part):
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "t")
        words = [f"--tokenizer_name={tmp_path / 't'}", "--add_pad_token=False"]
        assert_one_error(*run("autoencoder", *words), part)

    @pytest.mark.usefixtures("offline")
    def test_weights_that_are_not_there(self, run):
        for stage in ("baseline", "autoencoder"):
            error = run(stage, "--model_name_or_path=nowhere", "--tokenizer_name=bytes")
            assert_one_error(*error, "model_name_or_path: cannot load 'nowhere' as", "no such fol")
        error = run("calm", "--ae_name_or_path=nowhere", "--tokenizer_name=bytes")
        assert_one_error(*error, "ae_name_or_path: cannot load 'nowhere' as Autoencoder")

    def test_weights_that_are_cut_short(self, tmp_path, run, autoencoder):
        shutil.copytree(autoencoder, tmp_path / "cut")
        os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
        error = run("calm", f"--ae_name_or_path={tmp_path / 'cut'}")
        assert_one_error(*error, "is damaged: model.safetensors holds 1000 bytes")

    def test_a_loss_that_explodes_leaves_the_good_checkpoint(self, tmp_path, run, monkeypatch):
        compute_loss = CALMTrainer.compute_loss

        def exploding(self, *args, **kwargs):
            loss = compute_loss(self, *args, **kwargs)
            if self.state.global_step == 2:
                self._guard._values[-1] = loss.detach() * torch.inf
            return loss

        monkeypatch.setattr(CALMTrainer, "compute_loss", exploding)
        status, error = run("baseline")
        good = tmp_path / "baseline" / "checkpoint-2"
        parts = (
            "is inf in step 3",
            "learning rate 0.005",
            "gradient norm",
            "sequences 0 to 1",
            str(good),
        )
        assert_one_error(status, error, *parts)
        assert checkpoint_folders(tmp_path / "baseline") == [good]
        monkeypatch.undo()
        assert run("baseline")[0] == 0  # and the run can go on from there

    def test_a_full_disk_leaves_the_good_checkpoint(self, tmp_path, run, monkeypatch):
        save = torch.save

        def full(content, path, *args, **kwargs):
            if "checkpoint-4" in str(path):
                raise OSError(28, "No space left on device", str(path))
            save(content, path, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        assert_one_error(*run("baseline"), "No space left on device")
        monkeypatch.undo()
        assert run("baseline")[0] == 0
        assert (tmp_path / "baseline" / "incomplete-checkpoint-4").is_dir()
        assert len(logs(tmp_path / "baseline")) == 4


def test_an_interrupted_job_says_so(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("calm.training.job.run_job", Mock(side_effect=KeyboardInterrupt))
    assert MAIN["baseline"](flags(tmp_path, "baseline", text=write_corpus(tmp_path))) == 130
    assert "the same command goes on from the last checkpoint" in caplog.text
