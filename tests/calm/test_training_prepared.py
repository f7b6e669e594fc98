"""Training on prepared text: as on the text itself, exact after a stop, or refused."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from cli_cases import calm, error_of
from forked import run_in_two
from training_cases import MAIN, SIZES, flags, logs, write_corpus

from calm.data import parts
from calm.data.manifest import is_prepared
from calm.data.shards import ShardWriter
from calm.data.tokenizer import byte_tokenizer
from calm.training.checkpoints.resume import read_protocol
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.recipe import Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
STEPS = ("--max_steps=12", "--save_steps=10", "--per_device_train_batch_size=8")


@pytest.fixture
def text(tmp_path, capsys):
    """A prepared text: its folder."""
    words = (
        "--data",
        write_corpus(tmp_path),
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "text",
    )
    assert calm("prepare", *words, "--validation-split-percentage", 20) == 0
    capsys.readouterr()
    return tmp_path / "text"


def train(folder, *extra, stage="baseline", text=None):
    return MAIN[stage](flags(folder, stage, "--do_train", *extra, text=str(text)))


def test_losses_are_those_of_the_text(text, tmp_path):
    """In the order of the text. That it is streamed says nothing new of a prepared text."""
    found = {}
    for name, source in {"plain": tmp_path / "text.jsonl", "prepared": text}.items():
        for number in range(2):
            (tmp_path / f"{name}{number}").mkdir()
        order = "--train_sampling_strategy=sequential"
        streaming = f"--streaming={name == 'prepared'}"
        assert train(tmp_path / f"{name}0", order, streaming, "--do_eval", text=source) == 0
        folder = tmp_path / f"{name}0" / "baseline"
        scores = json.loads((folder / "eval_results.json").read_text())
        found[name] = (
            logs(folder),
            scores["eval_loss"],
            (folder / "model.safetensors").read_bytes(),
        )
    assert found["plain"] == found["prepared"]


def test_a_stopped_run_goes_on_bit_equal(text, tmp_path):
    """In the second epoch, with loader workers where there were none."""
    folder = tmp_path / "baseline"
    assert train(tmp_path, *STEPS, text=text) == 0
    whole = logs(folder), (folder / "model.safetensors").read_bytes()
    record = read_protocol(folder)
    assert 8 * 7 < record["train"]["blocks"] < 8 * 10 and record["train_files"] == ["text"]
    shutil.rmtree(folder / "checkpoint-12")
    assert train(tmp_path, *STEPS, "--dataloader_num_workers=2", text=text) == 0
    assert (logs(folder), (folder / "model.safetensors").read_bytes()) == whole
    assert read_protocol(folder)["changes"] == []


def test_a_prepared_text_has_a_length(text):
    """Without max_steps, also where a command of old asks for a stream."""
    words = [f"--train_file={text}", "--streaming", "--output_dir=out", "--use_cpu"]
    assert parse_arguments(words, Stage.BASELINE).training.max_steps == -1


def test_the_folder_says_what_is_held_out(text):
    """Not the recipe, which holds out 10 % of its own text."""
    words = ["--config=tiny", f"--train_file={text}", "--output_dir=out"]
    assert parse_arguments(words, Stage.BASELINE).data.validation_split_percentage == 20


def test_what_does_not_fit_is_refused_in_one_line(text, tmp_path, capsys):
    def refused(*extra, stage="baseline"):
        assert train(tmp_path, *extra, stage=stage, text=text) == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        (message,) = lines
        return message

    assert "was prepared with 20 % held out, got 5" in refused("--validation_split_percentage=5")
    assert "exclude each other" in refused("--dataset_name=embedded:topics")
    assert "exclude each other" in refused(
        "--train_file=", f"--validation_file={text}", "--dataset_name=embedded:topics"
    )
    (tmp_path / "other").mkdir()
    words = ("--data", tmp_path / "text.jsonl", "--tokenizer", "bpe:300", "--output")
    assert calm("prepare", *words, tmp_path / "other") == 0
    other = f"--tokenizer_name={tmp_path / 'other'}"
    assert "was prepared with another tokenizer" in refused(other)
    sizes = "hidden_size=16,intermediate_size=24,latent_size=8,patch_size=3"
    assert "multiple of patch_size (K=3)" in refused(
        f"--config_overrides={sizes}", stage="autoencoder"
    )
    (text / "prepared.json").unlink()
    assert "is not a file; a folder needs a glob" in refused()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_folders_that_no_process_trains_on(processes, text, trained_calm, tmp_path, capsys):
    """Each process ends with one line, none waits: damage, another tokenizer, another K."""
    words = ("--data", tmp_path / "text.jsonl", "--validation-split-percentage", 20)
    for name, tokenizer, patch_size in (("other", "bpe:300", 4), ("three", "bytes", 3)):
        words_of_it = (*words, "--tokenizer", tokenizer, "--patch-size", patch_size)
        assert calm("prepare", *words_of_it, "--output", tmp_path / name) == 0
    for name, ending in (("cut", ".tokens"), ("gone", ".documents")):
        shutil.copytree(text, tmp_path / name)
        shard = next((tmp_path / name).glob(f"train-*{ending}"))
        shard.write_bytes(shard.read_bytes()[:-1])
    shard.unlink()
    shutil.copytree(text, tmp_path / "edited")
    record = tmp_path / "edited" / "prepared.json"
    record.write_text(record.read_text().replace('"tokens"', '"token_count"'))
    cases = {
        "cut": " bytes, and prepared.json says ",
        "gone": " is missing, and prepared.json says ",
        "edited": "edited is damaged: prepared.json holds",
        "other": "was prepared with another tokenizer",
        "three": "start chunks of K=3 tokens, and the model has K=4",
    }
    autoencoder = f"--ae_name_or_path={trained_calm / 'autoencoder'}"
    overrides = f"--config_overrides={SIZES['calm']},has_start_patch=true"
    jobs = [
        flags(tmp_path, "calm", "--do_train", autoencoder, overrides, text=str(tmp_path / name))
        for name in cases
    ]
    capsys.readouterr()
    if processes == 1:
        assert refusals(jobs) == 0
        printed = [capsys.readouterr().err]
    else:
        run_in_two(tmp_path, refusals, jobs)
        printed = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    for found in printed:
        errors = [line for line in found.splitlines() if line.startswith("error: ")]
        assert len(errors) == len(cases) and "Traceback" not in found, found
        for error, expected in zip(errors, cases.values(), strict=True):
            assert expected in error


def refusals(jobs):
    """In each process: jobs that must end with an error of one line."""
    return int(any(MAIN["calm"](words) != 2 for words in jobs))


@pytest.mark.slow
def test_two_processes_share_one_shard(text, tmp_path):
    """They learn what one does from the same blocks."""
    assert len(list(text.glob("train-*.tokens"))) == 1
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "one", "--per_device_train_batch_size=4", text=text) == 0
    words = flags(tmp_path / "two", "baseline", "--do_train", text=str(text))
    run_in_two(tmp_path, MAIN["baseline"], words)
    expected = logs(tmp_path / "one" / "baseline")
    assert len(expected) == 4
    assert logs(tmp_path / "two" / "baseline") == pytest.approx(expected, rel=1e-5)


def test_a_command_that_was_stopped_leaves_the_same_files(tmp_path, capsys, monkeypatch):
    """With a tokenizer that it has trained, and that the second run reads back."""
    monkeypatch.setattr(parts, "MIN_SHARD", 1000)
    words = ("prepare", "--data", write_corpus(tmp_path), "--tokenizer", "bpe:300", "--output")
    assert calm(*words, tmp_path / "whole") == 0
    finish, made = ShardWriter.finish, []

    def stop(self):
        made.append(self)
        if len(made) == 3:
            raise KeyboardInterrupt
        return finish(self)

    monkeypatch.setattr(ShardWriter, "finish", stop)
    assert calm(*words, tmp_path / "out") == 130
    assert is_prepared(tmp_path / "out") and calm(*words, tmp_path / "out") == 0
    found = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("whole", "out")
    ]
    assert found[0] == found[1]


def test_calm_prepare_mixes_and_verifies(tmp_path, capsys):
    for name in ("web", "code"):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name)
    sources = [f"--source={name}={tmp_path / name / 'text.jsonl'}" for name in ("web", "code")]
    words = ("prepare", *sources, "--tokenizer", "bpe:300", "--output", tmp_path / "out")
    assert "weights must sum to 1" in error_of(capsys, *words, "--mixture", "web=0.7,code=0.1")
    assert "pass --data TEXT, or --source" in error_of(capsys, *words[:1], *words[3:])
    assert "--mixture gives shares" in error_of(
        capsys, "prepare", "--data", tmp_path / "web/text.jsonl", *words[3:], "--mixture", "web=1"
    )
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # the second time it is there
        assert calm(*words, "--mixture", "web=0.7,code=0.3") == 0
        assert "training    1" in capsys.readouterr().out
    assert "holds another prepared text" in error_of(capsys, *words)
    assert calm("verify", tmp_path / "out") == 0
    shard = min((tmp_path / "out").glob("train-code*.tokens"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert calm("verify", tmp_path / "out") == 1
    assert f"the bytes of {shard.name} are not those" in capsys.readouterr().out
    assert calm(*words, "--overwrite") == 0
    assert calm("verify", tmp_path / "out") == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_what_was_skipped_is_not_finished_for_a_run_that_stops(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(100)]
    path.write_text("\n".join([*lines, "no json", "{}"]))
    words = ("prepare", "--data", path, "--tokenizer", "bytes", "--output", tmp_path / "out")
    for _ in range(2):
        assert calm(*words, "--on-error", "skip") == 0
    assert "skipped     2 entries" in capsys.readouterr().out
    assert "2 entries were skipped when" in error_of(capsys, *words)


def test_a_text_that_replaces_another_keeps_nothing_of_its_tokenizer(tmp_path):
    write_corpus(tmp_path)
    tokenizer, out = byte_tokenizer(), tmp_path / "out"
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "chats")
    words = ("prepare", "--data", tmp_path / "text.jsonl", "--output", out)
    assert calm(*words, "--tokenizer", tmp_path / "chats") == 0
    assert (out / "chat_template.jinja").is_file()
    assert calm(*words, "--tokenizer", "bytes", "--overwrite") == 0
    assert not (out / "chat_template.jinja").exists() and calm("verify", out) == 0


def test_the_example_fine_tunes(folders, tmp_path, capsys):
    """It prepares a text with the model's tokenizer, trains on it, and compares both models."""
    example = Path(__file__).resolve().parents[2] / "examples" / "fine_tune.py"
    few = ("--max_steps=2", "--eval_steps=2", "--max_eval_samples=2", "--use_cpu")
    words = (str(folders / "calm"), write_corpus(tmp_path, 200), str(tmp_path / "out"))
    assert runpy.run_path(str(example))["main"](*words, *few) == 0
    record = read_protocol(tmp_path / "out" / "model")
    assert record["train_files"] == ["text"] and record["training"]["learning_rate"] == 3e-5
    table = capsys.readouterr().out
    assert str(folders / "calm") in table and str(tmp_path / "out" / "model") in table
