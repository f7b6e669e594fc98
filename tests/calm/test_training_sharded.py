"""Weights in shards: several processes learn what one learns; checkpoints that any number reads."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import run_in
from safetensors.torch import load_file
from sharded_worker import BUILD, check_units, go_on, results_of, train, trainer_of
from training_cases import MAIN, SIZES, flags, logs, write_corpus

from calm import Autoencoder, EnergyTransformer
from calm.cli import main as cli
from calm.errors import UserError
from calm.integrity import write_manifest
from calm.models.loading import load_checked
from calm.training.checkpoints.complete import checkpoint_damage
from calm.training.sharding.checkpoints import has_shards, load_model_shards, shard_shapes

ROOT = Path(__file__).resolve().parents[2]
SAVED = {"save_strategy": "steps", "save_steps": 10}
# Long ones: all models and stages, and what training may do beside.
CASES = {
    **{name: (name, {}) for name in BUILD if name not in ("energy", "small")},
    "accumulated": ("energy", {"gradient_accumulation_steps": 3}),
    "checkpointed": ("energy", {"gradient_checkpointing": True}),
    "kept": ("energy", {"fsdp_config": {"reshard_after_forward": False}}),
}


def agree(found, expected):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, value in found["scores"].items():
        assert value == pytest.approx(expected["scores"][name], rel=1e-5, abs=1e-6), name
    assert found.get("text") == expected.get("text")


def whole(trainer):
    """Weights and results of a trainer in this process."""
    trainer.train()
    return results_of(trainer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 20 steps in two processes with two checkpoints, and its results."""
    folder = tmp_path_factory.mktemp("sharded")
    run_in(2, folder, train, folder, {"small": ("small", SAVED)})
    return folder / "small", json.loads((folder / "sharded.json").read_text())["small"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same in one process, without shards."""
    return whole(trainer_of("small", tmp_path_factory.mktemp("whole")))


def test_two_processes_with_shards_are_one(run, expected):
    """Losses of 20 steps, BrierLM, health, a text, and final weights that load."""
    folder, results = run
    assert len(results["loss"]) == 20 and "eval_conditioning_share" in results["scores"]
    agree(results, expected)
    EnergyTransformer.from_pretrained(folder / "model")


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_goes_on(run, expected, tmp_path, processes):
    """Of three, one has no row of some weights. One process needs no shards."""
    arguments = (tmp_path, "small", run[0] / "checkpoint-10", processes)
    if processes == 1:
        go_on(*arguments)
    else:
        run_in(processes, tmp_path, go_on, *arguments)
    losses = json.loads((tmp_path / "resumed.json").read_text())
    assert losses == pytest.approx(expected["loss"], rel=1e-6)  # those before are in the checkpoint


def test_a_merged_checkpoint_is_what_the_end_of_the_run_saved(run, tmp_path, capsys):
    folder, output = run[0], tmp_path / "model"
    words = ["merge", str(folder / "checkpoint-20"), "--output", str(output)]
    assert cli(words) == 0
    captured = capsys.readouterr()
    assert f"{output}: EnergyTransformer" in captured.out and "shards:" not in captured.err
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, folder / "model"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert json.loads((output / "config.json").read_text())["architectures"] == [
        "EnergyTransformer"
    ]
    assert cli(["verify", str(output)]) == 0
    assert cli(words) == 2  # it holds something now
    assert "must be a new or an empty folder" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


HARMS = {
    "one bit": ("pytorch_model_fsdp_0/__0_0.distcp", "the bytes of", False),
    "a lost shard": ("optimizer_0/__1_0.distcp", "__1_0.distcp is missing", False),
    "a shard that was never listed": ("pytorch_model_fsdp_0/__1_0.distcp", "missing or cut", True),
    "a description that runs code": ("pytorch_model_fsdp_0/.metadata", "would run", True),
    "no description": ("optimizer_0/.metadata", "there is no .metadata", True),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_before_anything_is_read(run, tmp_path, monkeypatch, capsys, harm):
    name, complaint, is_listed = HARMS[harm]
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(run[0] / "checkpoint-10", checkpoint)
    path = checkpoint / name
    if harm == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "a description that runs code":
        path.write_bytes(pickle.dumps(Hostile()))
    else:
        path.unlink()
    if is_listed:
        write_manifest(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert complaint in str(checkpoint_damage(checkpoint))
    assert cli(["merge", str(checkpoint), "--output", "out"]) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("out").exists() and not Path("it-ran").exists()


def test_shards_of_another_model_are_refused(run):
    checkpoint = run[0] / "checkpoint-10"
    assert shard_shapes(checkpoint)["mlp_generator.noise_embd.weight"] == [16, 6]
    with pytest.raises(UserError, match=r"latent_to_hidden.* \[12, 8\].* got \[12, 4\]"):
        load_model_shards(checkpoint, BUILD["energy"]())
    with pytest.raises(UserError, match=r"x: the weights in .* lie in shards.*calm merge"):
        load_checked(EnergyTransformer, str(checkpoint), "x")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # no name fits all versions
def test_all_models_and_what_training_may_do_beside(tmp_path):
    run_in(2, tmp_path, check_units, tmp_path)
    run_in(2, tmp_path, train, tmp_path, CASES)
    results = json.loads((tmp_path / "sharded.json").read_text())
    for case, (name, settings) in CASES.items():
        rest = {key: value for key, value in settings.items() if key != "fsdp_config"}
        agree(results[case], whole(trainer_of(name, tmp_path / "whole", **rest)))


# Gathered weights are all rounded to 2^-9; autocast leaves embeddings, norms and biases whole.
BFLOAT16 = {"rel": 2e-3}  # of losses; measured: 7e-4


@pytest.mark.long
def test_bfloat16_gathers_rounded_weights_and_keeps_whole_ones(tmp_path):
    """Losses as under autocast, up to the rounding of what autocast leaves in float32."""
    names = ("energy", "autoencoder", "flow", "baseline", "terms", "tempered")
    run_in(2, tmp_path, train, tmp_path, {name: (name, {"bf16": True}) for name in names})
    results = json.loads((tmp_path / "sharded.json").read_text())
    for name in names:
        expected = whole(trainer_of(name, tmp_path / "whole", bf16=True))
        assert len(results[name]["loss"]) == 20
        assert results[name]["loss"] == pytest.approx(expected["loss"], **BFLOAT16), name
        weights = load_file(tmp_path / name / "model" / "model.safetensors").values()
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert not all(weight.equal(weight.bfloat16().float()) for weight in weights)


@pytest.mark.long
def test_a_temperature_is_learned_from_latents_in_bfloat16(tmp_path):
    """By the program, and what it measures of the finished head, whose weights lie in shards."""
    text, few = write_corpus(tmp_path), ("--max_steps=2", "--save_strategy=no")
    assert MAIN["autoencoder"](flags(tmp_path, "autoencoder", *few, text=text)) == 0
    sizes = f"--config_overrides={SIZES['calm']},input_type=latent"
    ae_flag = f"--ae_name_or_path={tmp_path / 'autoencoder'}"
    assert MAIN["calm"](flags(tmp_path, "calm", ae_flag, sizes, *few, text=text)) == 0
    words = [
        f"--model_name_or_path={tmp_path / 'calm'}", "--min_draws=8", "--max_draws=12", "--bf16",
        "--max_steps=6", "--max_train_samples=16", "--learning_rate=1e-3", "--save_strategy=no",
        "--do_train", "--do_eval",
    ]  # fmt: skip
    shards, alone = ([*flags(tmp_path / name, "temperature", *words, text=text)]
                     for name in ("shards", "alone"))  # fmt: skip
    run_in(2, tmp_path, MAIN["temperature"], [*shards, "--fsdp"])
    assert MAIN["temperature"]([*alone, "--gradient_accumulation_steps=2"]) == 0
    folders = [tmp_path / name / "temperature" for name in ("shards", "alone")]
    found, expected = (logs(folder) for folder in folders)
    assert len(found) == 6 and found == pytest.approx(expected, **BFLOAT16)
    models = [EnergyTransformer.from_pretrained(folder) for folder in folders]
    spreads = [model.config.tempered_spread for model in models]
    for ours, theirs in zip(*spreads, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2",
    ],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launched_run_goes_on_in_one_process(launcher, tmp_path):
    text = write_corpus(tmp_path)
    common = ("--do_train", "--do_eval", "--max_train_samples=16")
    words = flags(tmp_path, "autoencoder", *common, text=text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "calm.training.train_autoencoder",
         *words, *(["--fsdp"] if launcher == "torchrun" else [])],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    folder = tmp_path / "autoencoder"
    assert done.returncode == 0, done.stderr
    assert has_shards(folder / "checkpoint-4") and len(logs(folder)) == 4
    Autoencoder.from_pretrained(folder)
    more = [*words, "--gradient_accumulation_steps=2", "--max_steps=6", "--allow_changes"]
    assert MAIN["autoencoder"](more) == 0
    assert len(logs(folder)) == 6 and not has_shards(folder / "checkpoint-6")
