"""The command line: what it prints, what it writes, and one line for every mistake."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import TEXT, calm, error_of

from calm import cli
from calm.data.tokenizer import train_bpe_tokenizer

# Help


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as done:
        calm("--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name, command in {**cli.COMMANDS, **cli.TRAINING}.items():
        assert re.search(rf"^    {name}\s", text, re.MULTILINE) and command.help in text
    assert calm() == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    "name", ["env", "demo", "prepare", "plan", "eval", "compare", "plot", "generate", "experiment"]
)
def test_each_command_has_help_with_examples(name, capsys):
    with pytest.raises(SystemExit) as done:
        calm(name, "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: calm {name}" in text and f"\n  calm {name}" in text
    assert "==SUPPRESS==" not in text


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        calm("--version")
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("calm ")


def test_the_console_script_runs():
    done = subprocess.run(
        [sys.executable, "-m", "calm.cli", "plan", "no-such-recipe"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# env


def test_env_for_people_and_scripts(capsys):
    assert calm("env") == 0
    text = capsys.readouterr().out
    assert calm("env", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["torch"] in text
    assert set(facts["backend"]["operations"]) >= {"energy_score", "linear_argmax"}
    expected = {"torch"} if not torch.cuda.is_available() else {"torch", "triton"}
    assert {entry["chosen"] for entry in facts["backend"]["operations"].values()} <= expected
    for key in ("gpus", "driver", "triton_cache", "python", "cpu"):
        assert key in facts
    assert facts["triton_cache"]["folder"] in text and facts["driver"]["state"] in text


def test_env_reports_a_setting_that_cannot_run(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    monkeypatch.setenv("CALM_KERNELS_BACKEND", "nonsense")
    assert calm("env", "--json") == 0
    backend = json.loads(capsys.readouterr().out)["backend"]
    assert backend["setting"] == "nonsense"
    assert "must be one of" in backend["operations"]["energy_score"]["chosen"]


# plan


def test_plan_counts_the_published_sizes(capsys):
    assert calm("plan", "calm-m", "--json") == 0
    counts = json.loads(capsys.readouterr().out)["calm-m"]["calm"]
    assert counts["total"] == 371_731_584
    assert counts["its_autoencoder"] == 75_831_552
    parts = ("embedding", "compressor", "backbone", "head")
    assert sum(counts[part] for part in parts) == counts["total"]
    assert calm("plan", "calm-m") == 0
    assert "371,731,584     371.73M" in capsys.readouterr().out


def test_plan_without_a_name_lists_all(capsys):
    assert calm("plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("calm-10b ") and "10,0" in line for line in lines)
    assert sum(line.startswith("demo ") for line in lines) == 3


@pytest.mark.parametrize("kind", ["calm", "baseline", "ae"])
def test_plan_of_a_checkpoint_counts_what_it_holds(kind, folders, capsys):
    assert calm("plan", folders / kind, "--json") == 0
    (stages,) = json.loads(capsys.readouterr().out).values()
    (counts,) = stages.values()
    from safetensors.torch import load_file

    saved = load_file(folders / kind / "model.safetensors")
    total = sum(tensor.numel() for tensor in saved.values())
    assert counts["total"] + counts.get("its_autoencoder", 0) == total


def test_plan_takes_the_vocabulary(capsys):
    assert calm("plan", "baseline-s", "--vocab-size", 1000, "--json") == 0
    counts = json.loads(capsys.readouterr().out)["baseline-s"]["baseline"]
    assert counts["embedding"] == counts["output"] == 768_000


# prepare


def test_prepare_saves_a_tokenizer_that_loads(folders, tmp_path, capsys):
    arguments = ("--data", folders / "text.txt", "--tokenizer", "bpe:300")
    words = ("prepare", *arguments, "--output", tmp_path / "bpe", "--cache-dir", tmp_path / "cache")
    assert calm(*words, "--validation-split-percentage", 0) == 0
    text = capsys.readouterr().out
    assert "30 documents" in text and f"{30 * len(TEXT):,} characters" in text
    from calm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_names_what_it_cannot_read(workers, tmp_path, capsys):
    for name in "ab":
        lines = ['{"text": "one"}', "oops", '{"text": "two"}']
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ("--data", tmp_path / "*.jsonl", "--tokenizer", "bytes", "--output", tmp_path / "bytes")
    words = (*words, "--cache-dir", tmp_path / "cache", "--workers", workers)
    words = (*words, "--validation-split-percentage", 0)
    message = error_of(capsys, "prepare", *words)
    assert "a.jsonl:2: not JSON" in message and "(and 1 more); mend the text" in message
    assert message.endswith("or skip what is damaged (--on-error=skip)")
    assert calm("prepare", *words, "--on-error", "skip") == 0
    captured = capsys.readouterr()
    assert "4 documents" in captured.out


def test_the_demo_advises_flags_that_it_has(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one line\nanother\n", encoding="utf-8")
    words = ("--text", tmp_path / "text.txt", "--output-dir", tmp_path / "demo")
    assert calm("demo", *words) == 2
    (message,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "1 documents leave no validation document" in message and "(--text-unit)" in message
    assert "validation_file" not in message and "--validation" not in message


# eval


def test_eval_records_what_it_skipped(folders, tmp_path, caplog):
    record, text = tmp_path / "brier.json", tmp_path / "text.jsonl"
    line = json.dumps({"text": TEXT})
    text.write_text(f"{line}\n{line[:-1]}\n{line}\n", encoding="utf-8")
    words = ("--model", folders / "calm", "--data", text, "--block-size", 32, "--json", record)
    assert calm("eval", *words, "--num-samples", 2, "--on-error", "skip") == 0
    assert json.loads(record.read_text(encoding="utf-8"))["protocol"]["skipped_documents"] == 1
    assert "skipped 1 of 3 documents, the first: " in caplog.text


def test_eval_of_a_dataset_with_a_test_split_alone(folders, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    line = json.dumps({"text": TEXT})
    (tmp_path / "set" / "test.jsonl").write_text(f"{line}\n" * 4, encoding="utf-8")
    words = ("--model", folders / "calm", "--data", tmp_path / "set", "--block-size", 32)
    assert calm("eval", *words, "--num-samples", 2) == 0
    assert "BrierLM" in capsys.readouterr().out
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    message = error_of(capsys, "eval", *words[:2], "--data", tmp_path / "b.parquet")
    assert "b.parquet: row 0: damaged Parquet file" in message


@pytest.mark.parametrize("kind", ["calm", "baseline"])
def test_eval_prints_a_table_and_writes_the_record(kind, folders, tmp_path, capsys):
    record = tmp_path / "brier.json"
    words = ("--model", folders / kind, "--data", folders / "text.txt", "--block-size", 32)
    assert calm("eval", *words, "--max-blocks", 6, "--seed", 3, "--json", record) == 0
    table = capsys.readouterr().out
    assert "BrierLM" in table and "Brier-4 (%)" in table
    written = json.loads(record.read_text(encoding="utf-8"))
    measures, protocol = written["measures"], written["protocol"]
    if kind == "calm":
        assert "energy loss" in table and "conditioning gap" in table
        assert measures["excess"] == pytest.approx(measures["energy"] - measures["floor"])
        assert any(line.startswith("reconstruction is ") for line in written["advice"])  # untrained
    else:  # a byte for each token
        bits = measures["cross_entropy"] / math.log(2)
        assert measures["bits_per_byte"] == pytest.approx(bits, rel=0.05)
    assert set(written["measures_standard_errors"]) <= set(measures)
    assert protocol["blocks"] == 6 and protocol["block_size"] == 32 and protocol["seed"] == 3
    assert protocol["data"] == str(folders / "text.txt")
    assert calm("eval", *words, "--max-blocks", 6, "--seed", 3, "--batch-size", 1) == 0
    assert capsys.readouterr().out == table


def test_eval_of_a_readout_has_its_likelihood(folders, tmp_path, capsys):
    """An untrained readout finds all tokens equally likely."""
    record = tmp_path / "brier.json"
    words = ("--data", folders / "text.txt", "--block-size", 32, "--max-blocks", 3)
    words = (*words, "--method", "readout", "--num-samples", 4)
    assert calm("eval", "--model", folders / "readout", *words, "--json", record) == 0
    assert "bits per byte" in capsys.readouterr().out
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["protocol"]["method"] == "readout"
    assert written["measures"]["bits"] == pytest.approx(4 * math.log2(259))
    assert written["measures"]["bits_per_byte"] == pytest.approx(math.log2(259), rel=0.05)
    assert calm("eval", "--model", folders / "baseline", *words) == 0  # is a readout of its own
    assert "cross-entropy" in capsys.readouterr().out
    error = error_of(capsys, "eval", "--model", folders / "calm", *words)
    assert "the model has no readout of tokens" in error


def test_eval_of_an_embedded_corpus_takes_held_out_documents(folders, tmp_path):
    record = tmp_path / "brier.json"
    words = ("--model", folders / "calm", "--data", "embedded:topics", "--max-blocks", 2)
    assert calm("eval", *words, "--block-size", 16, "--num-samples", 2, "--json", record) == 0
    assert json.loads(record.read_text(encoding="utf-8"))["protocol"]["data"] == "embedded:topics"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--block-size", 30), "--block-size must be a multiple of patch_size (K=4)"),
        (("--block-size", 4096), "--block-size 4096 exceeds the model's context of 256 tokens"),
        (
            ("--num-samples", 1),
            "--num-samples must be at least 2, and --brier-draws lie between 2 and --num-samples",
        ),
        (("--json", "/no/such/folder/x.json"), "cannot be written"),
        (("--data", "/no/such/file.txt"), "error: --data: no file matches '/no/such/file.txt'"),
        (("--brier-draws", "two"), "invalid int value: 'two' (see `calm eval --help`)"),
        (("--blocksize", 32), "unrecognized arguments: --blocksize 32 (see `calm eval --help`)"),
        (("--device", "tpu9000"), "--device must be cpu, cuda"),
        (("--backend", "triton"), "triton"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_mistakes_in_eval(words, message, folders, capsys):
    base = ("--model", folders / "calm", "--data", folders / "text.txt", "--block-size", 32)
    assert message in error_of(capsys, "eval", *base, *words)


# Folders


def broken_folder(root, folders, kind):
    """A folder that holds no model that can be loaded, in one of many ways."""
    source, folder = folders / "calm", root / "model"
    if kind == "missing":
        return folder
    if kind == "parent":
        return folders
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config, weights = folder / "config.json", folder / "model.safetensors"
    match kind:
        case "config-damaged":
            config.write_text('{"model_type": ', encoding="utf-8")
        case "config-foreign":
            config.write_text('{"model_type": "bert"}', encoding="utf-8")
        case "weights-missing":
            weights.unlink()
        case "weights-cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "weights-of-another":
            weights.write_bytes((folders / "baseline" / "model.safetensors").read_bytes())
        case "config-of-another":
            config.write_bytes((folders / "baseline" / "config.json").read_bytes())
        case "tokenizer-missing":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        case "tokenizer-larger":
            train_bpe_tokenizer([TEXT * 30], 300).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers on the weights it does not find
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "missing",
            "or a model that comes with the package: calm-docstrings, calm-docstrings-base",
        ),
        ("parent", "holds no config.json; it has model folders in it: ae, baseline, calm"),
        ("config-damaged", "config.json is damaged"),
        ("config-foreign", "holds a 'bert' model"),
        ("weights-missing", "cannot load"),
        ("weights-cut", "cannot load"),
        ("weights-of-another", "lacks weights of its autoencoder"),
        ("config-of-another", "weights that BaselineTransformer needs"),
        ("tokenizer-missing", "holds no tokenizer; pass one with --tokenizer"),
        ("tokenizer-larger", "more than the vocabulary of the model, 259"),
    ],
)
def test_wrong_folders(kind, message, folders, tmp_path, capsys):
    folder = broken_folder(tmp_path, folders, kind)
    capsys.readouterr()
    assert calm("generate", "--model", folder, "--prompt", "the quick br") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors


def test_an_autoencoder_is_no_language_model(folders, capsys):
    message = error_of(capsys, "generate", "--model", folders / "ae", "--prompt", "the quick br")
    assert "holds an autoencoder; pass the folder of a language model" in message


# The command itself


def test_unknown_commands_are_named(capsys):
    assert "no command 'evla'; did you mean 'eval'?" in error_of(capsys, "evla")
    assert "no command 'zzz' (see `calm --help`)" in error_of(capsys, "zzz")


def test_training_commands_get_their_words(monkeypatch):
    import importlib

    seen = {}
    for name, command in cli.TRAINING.items():
        module = importlib.import_module(command.module)
        monkeypatch.setattr(
            module, "main", lambda words, name=name: seen.update({name: words}) or 0
        )
    for name in cli.TRAINING:
        assert calm(name, "--config", "tiny", "--help") == 0
    assert seen == {name: ["--config", "tiny", "--help"] for name in cli.TRAINING}


def test_a_traceback_on_request(capsys):
    assert calm("--traceback", "plan", "no-such-recipe") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


def test_golden_checkpoints_can_be_planned(capsys):
    folder = Path(__file__).parents[1] / "goldens" / "flow-k4"
    assert calm("plan", folder) == 0
    assert "its autoencoder" in capsys.readouterr().out
