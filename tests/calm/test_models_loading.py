"""Loading what a user names: no code runs, no weight is dropped or missing unsaid."""

import io
import json
import os
import pickle
import shutil

import pytest
import torch
from training_cases import tiny_baseline

from calm import BaselineTransformer, EnergyTransformer
from calm.data.tokenizer import load_tokenizer
from calm.errors import UserError
from calm.models.loading import load_checked, load_config
from calm.training.building import check_context
from calm.training.monitoring.scoring import check_best_metric


def copy_of(folders, tmp_path):
    return shutil.copytree(folders / "calm", tmp_path / "model")


def test_fewer_layers_than_the_weights_are_named(folders, tmp_path):
    config = copy_of(folders, tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"^--model: .* has no place .*transformer\.layers\.1\."):
        load_checked(EnergyTransformer, str(config.parent), "--model")


def test_a_pickle_runs_nothing_and_is_one_line(folders, tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    monkeypatch.chdir(tmp_path)
    folder = copy_of(folders, tmp_path)
    (folder / "model.safetensors").unlink()
    memory = io.BytesIO()
    torch.save({"weight": Bomb()}, memory)
    (folder / "pytorch_model.bin").write_bytes(memory.getvalue())
    with pytest.raises(UserError, match=r"cannot load .* or would run code, which does not happen"):
        load_checked(EnergyTransformer, str(folder), "--model")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb()))  # it works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_a_tokenizer_gets_no_answer_from_standard_input(folders, tmp_path, monkeypatch, answer):
    folder = copy_of(folders, tmp_path)
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    path = folder / "tokenizer_config.json"
    entries = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(UserError, match=r"needs code of its own, .* unless you pass trust_remote"):
        load_tokenizer(str(folder))
    with pytest.raises(SystemExit, match="ran"):
        load_tokenizer(str(folder), trust_remote_code=True)


def test_a_damaged_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(UserError, match="config_name: cannot load"):
        load_config(BaselineTransformer.config_class, str(tmp_path), "config_name")


def test_positions_reach_to_the_end_of_a_block():
    model = tiny_baseline()
    context = model.config.max_position_embeddings
    check_context(model, context)
    with pytest.raises(UserError, match=f"max_position_embeddings={context} is too small .*"):
        check_context(model, context + 1)


def test_the_best_metric_must_be_one_that_is_reported():
    model = tiny_baseline()
    for name in (None, "loss", "eval_brier_lm"):
        check_best_metric(name, model)
    with pytest.raises(UserError, match=r"metric_for_best_model must be one of loss, .*'accuracy'"):
        check_best_metric("accuracy", model)
