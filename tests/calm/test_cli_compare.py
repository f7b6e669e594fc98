"""`calm compare`: models of different K on one text, and what it refuses to compare."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from cli_cases import calm, error_of
from tiny_models import tiny_calm

from calm.evaluation import score_text
from calm.experiments.leaderboard import Entry, rank
from calm.training.checkpoints.resume import PROTOCOL

TRAINED = {
    "dataset": "embedded:topics", "validation_split_percentage": 10, "block_size": 40,
    "tokenizer_hash": "a",
    "training": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 1,
    },
}  # fmt: skip


@pytest.fixture
def runs(folders, tmp_path):
    """A CALM of K = 4 and a baseline, each with the record of its training."""
    for name in ("calm", "baseline"):
        shutil.copytree(folders / name, tmp_path / name)
        change(tmp_path / name)
    (tmp_path / "calm" / "trainer_state.json").write_text('{"global_step": 100}', encoding="utf-8")
    return tmp_path


def change(run, **entries):
    (run / PROTOCOL).write_text(json.dumps({**TRAINED, **entries}), encoding="utf-8")


def test_runs_are_compared_on_what_they_held_out(runs, capsys):
    record, plot = runs / "compare.json", runs / "compare.png"
    words = (runs / "calm", runs / "baseline", "--num-samples", 2, "--max-blocks", 3)
    assert calm("compare", *words, "--json", record, "--plot", plot) == 0
    printed = capsys.readouterr().out
    assert "text: embedded:topics, the 10 % held out (as in training)" in printed
    assert "tied" in printed and "24k" in printed  # 100 steps of 2 * 3 blocks of 40 tokens
    assert plot.stat().st_size > 5000
    board = json.loads(record.read_text(encoding="utf-8"))
    first, second = board["rows"]
    assert {first["name"], second["name"]} == {str(runs / "calm"), str(runs / "baseline")}
    assert first["to_first"] is None and board["decided_by"] in second["to_first"]["difference"]
    for protocol in board["protocols"]:
        assert protocol["block_size"] == 40 and protocol["data"] == "embedded:topics"
        assert protocol["positions"] == 3 * 8  # of the baseline those at multiples of four
    assert "BrierLM is 0 wherever" in printed  # untrained models


def test_draws_of_a_readout_are_compared_with_the_baseline(folders, runs):
    shutil.copytree(folders / "readout", runs / "readout")
    change(runs / "readout")
    words = (runs / "readout", runs / "baseline", "--num-samples", 2, "--max-blocks", 2)
    assert calm("compare", *words, "--method", "readout", "--json", runs / "compare.json") == 0
    board = json.loads((runs / "compare.json").read_text(encoding="utf-8"))
    assert {p["estimator"] for p in board["protocols"]} == {
        "pairs among all draws",
        "exact chances",
    }
    assert {p["method"] for p in board["protocols"]} == {"readout"}


@pytest.mark.parametrize(
    ("entries", "words", "message"),
    [
        (
            {"tokenizer_hash": "b"}, (),
            "cannot be compared: tokenizer_hash is b and a; an n-gram of one is not",
        ),
        ({"dataset": "embedded:docstrings"}, (), "were trained on different texts"),
        ({"validation_split_percentage": 5}, (), "baseline: embedded:topics, 5 % held out;"),
        ({}, ("--plot", "/no/such/folder/x.png"), "--plot /no/such/folder/x.png cannot be written"),
        ({}, ("--block-size", 30), "--block-size must be a multiple of patch_size (K=4)"),
    ],
    ids=["tokenizer", "text", "share", "plot", "block-size"],
)  # fmt: skip
def test_what_cannot_be_compared(entries, words, message, runs, capsys):
    change(runs / "baseline", **entries)
    assert calm("compare", runs / "baseline", runs / "calm", *words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_in_the_runs(runs, capsys):
    message = error_of(capsys, "compare", runs / "calm")
    assert "name at least two different folders" in message
    assert "RUN" in error_of(capsys, "compare", runs / "calm", runs / "none")
    config = json.loads((runs / "calm" / "config.json").read_text(encoding="utf-8"))
    half = json.dumps({**config, "dtype": "bfloat16"})
    (runs / "calm" / "config.json").write_text(half, encoding="utf-8")
    message = error_of(capsys, "compare", runs / "calm", runs / "baseline")
    assert "dtype is bfloat16 and float32; choose one for both with --dtype" in message
    (runs / "calm" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("calm", "baseline"):
        change(runs / name, dataset=None, train_files=["book.txt"])
    message = error_of(capsys, "compare", runs / "calm", runs / "baseline")
    assert message.endswith("was trained on book.txt; pass the text to score on with --data")
    (runs / "calm" / PROTOCOL).unlink()
    (runs / "baseline" / PROTOCOL).unlink()
    message = error_of(capsys, "compare", runs / "calm", runs / "baseline")
    assert "was without a protocol.json" in message


def entry(name, scores):
    return Entry(name, "energy", 4, 1000, None, scores)


def test_the_best_is_first_and_a_copy_ties():
    blocks = list(torch.randint(5, (24, 32), generator=torch.Generator().manual_seed(0)))
    scores = score_text(tiny_calm(vocab_size=5), blocks, num_samples=2)
    higher = replace(scores, terms=scores.terms + 0.1)
    board = rank([entry("low", scores), entry("high", higher), entry("copy", scores)])
    assert [row.name for row in board.rows] == ["high", "low", "copy"]
    best, low, copy = board.rows
    assert best.values["brier1"] > low.values["brier1"] == copy.values["brier1"]
    assert low.to_first.difference["brier1"] == pytest.approx(-0.1)
    assert best.to_first is None and not best.is_tied
    assert low.to_first == copy.to_first and not low.is_tied
    assert rank([entry("one", scores), entry("two", scores)]).rows[1].is_tied
