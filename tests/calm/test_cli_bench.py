"""`calm bench`: parity first, then a table."""

import json

import pytest
import torch
from cli_cases import calm, error_of

from calm.experiments import speed


def test_a_table_of_texts_and_operations(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", 16)  # the tiny baseline reads 64
    out = tmp_path / "speed.json"
    words = ("--model", folders / "readout", "--baseline", folders / "baseline")
    assert calm("bench", *words, "--rounds", 2, "--json", out) == 0
    record = json.loads(out.read_text())
    assert list(record["decoding"]) == [*speed.DRAWS, speed.BASELINE]
    table = capsys.readouterr().out
    times = record["decoding"]["readout, T = 1"]
    assert 0 < times["low"] <= times["median"] <= times["high"]
    assert f"{16e3 / times['median']:9.0f}" in table
    (name,) = (name for name in record["operations"] if name.startswith("linear_argmax"))
    ours, reference = (record["operations"][name][key]["median"] for key in ("ours", "reference"))
    assert f"{reference / ours:.2f}x" in table


def test_other_numbers_than_the_reference_are_not_timed():
    wrong = speed.Operation("wrong", "1", lambda backend: torch.ones(1) * (backend == "torch"))
    with pytest.raises(AssertionError, match="'wrong' and ours differ, nothing is timed"):
        speed._time_operation(wrong, 2)


def test_backends_that_differ_are_an_error_of_the_command(folders, capsys, monkeypatch):
    def differ(*_, **__):
        raise AssertionError("'readout' and ours differ, nothing is timed: 1 of 16")

    monkeypatch.setattr(speed, "assert_parity", differ)
    words = ("--model", folders / "readout", "--baseline", folders / "baseline")
    message = error_of(capsys, "bench", *words)
    assert "'readout' and ours differ, nothing is timed" in message


def test_a_model_of_the_wrong_kind_is_refused(folders, capsys):
    base = folders / "baseline"
    message = error_of(capsys, "bench", "--model", base, "--baseline", base)
    assert "--model takes a CALM" in message and "BaselineTransformer" in message
