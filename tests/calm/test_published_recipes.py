"""The published recipes: planned at full size, one step of a shrunk copy through the commands."""

import json
import math
import re

import pytest
import torch
import yaml
from cli_cases import calm, error_of
from training_cases import logs, write_corpus

from calm.integrity import saved_shapes
from calm.training.flags.recipe import Stage, load_recipe, recipe_names, recipe_stages
from calm.training.precision import has_bfloat16_units
from calm.training.stages import STAGES

# Parameters, in millions: counted, and as in the paper's table 1 (section 7.1 for the autoencoder)
# where it has the model.
PARAMETERS = {
    "autoencoder": (75.8, 75),
    "baseline-s": (282.0, 281),
    "baseline-m": (465.1, 465),
    "baseline-l": (847.0, 849),
    "baseline-10b": (9336.0, None),
    "calm-m": (371.7, 371),
    "calm-m-diffusion": (370.1, None),
    "calm-m-flow": (370.0, None),
    "calm-l": (735.3, 735),
    "calm-xl": (1829.8, 1820),
    "calm-10b": (10020.3, None),
}
SHARDED = ("baseline-10b", "calm-10b")

# The paper's section 7.1, and the scripts published with it.
TRAINING = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
# Steps of warm-up and of all, sequences of a step, tokens of one, by stage.
SCHEDULES = {
    Stage.AUTOENCODER: (1000, 30_000, 256, 2048),
    Stage.CALM: (2000, 250_000, 256, 8192),
    Stage.BASELINE: (2000, 250_000, 1024, 2048),
}
LOSSES = {
    Stage.AUTOENCODER: {"patch_size": 4, "ae_dropout": 0.15, "kl_clamp": 0.5, "kl_weight": 1e-3},
    Stage.CALM: {
        "patch_size": 4, "noise_size": 64, "num_samples": 8, "beta": 1.0, "targets": "analytic",
    },
    Stage.BASELINE: {"initializer_range": 0.02},
}  # fmt: skip

# What a shrunk copy changes: widths, depths, sequences. No other setting.
WIDTHS = {
    "latent_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_mlp_layers": 1,
}  # fmt: skip
SEQUENCES = {
    "block_size": 32, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2,
    "max_eval_samples": 2, "max_steps": 1, "logging_steps": 1,
}  # fmt: skip
ON_A_CPU = ("--torch_compile=false", "--dataloader_num_workers=0")


def stage_of(name):
    (stage,) = recipe_stages(name)
    return stage


def test_these_are_the_published_recipes():
    asking = {
        name
        for name in recipe_names()
        if load_recipe(name, recipe_stages(name)[0]).get("require_prepared") == "true"
    }
    assert asking == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_papers_and_fit_eight_gpus(name, capsys):
    """By what `calm plan` prints."""
    assert calm("plan", name, "--gpus", 8, *(["--fsdp"] if name in SHARDED else [])) == 0
    printed = capsys.readouterr().out
    total = int(re.search(r"  total +([\d,]+)", printed)[1].replace(",", ""))
    counted, published = PARAMETERS[name]
    assert round(total / 1e6, 1) == counted
    assert published is None or abs(counted / published - 1) < 0.011
    memory = float(re.search(r"memory a GPU +([\d.]+) GiB: weights [\d.]+, ", printed)[1])
    assert 2 < memory < 80e9 / 2**30 and "it fits a GPU of 80 GB" in printed


@pytest.mark.parametrize("name", PARAMETERS)
def test_schedules_are_the_papers(name):
    stage = stage_of(name)
    flags = load_recipe(name, stage)
    warmup, steps, sequences, block_size = SCHEDULES[stage]
    batch = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"])
    assert (int(flags["warmup_steps"]), int(flags["max_steps"])) == (warmup, steps)
    assert (8 * batch, int(flags["block_size"])) == (sequences, block_size)


@pytest.mark.parametrize("name", PARAMETERS)
def test_workers_read_ahead_and_layers_compile(name):
    """Nothing compiles where there are no decoder layers, or where their weights are split."""
    flags = load_recipe(name, stage_of(name))
    assert (flags["dataloader_num_workers"], flags["dataloader_prefetch_factor"]) == ("2", "8")
    compiles = flags.get("torch_compile", "false")
    assert compiles == ("false" if name in ("autoencoder", *SHARDED) else "true")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a prepared text, `text`, and raw text that is held out."""
    folder = tmp_path_factory.mktemp("recipes")
    words = ("--data", write_corpus(folder, 300), "--tokenizer", "bytes", "--output")
    split = ("--validation-split-percentage", 0)
    assert calm("prepare", *words, folder / "text", *split) == 0
    (folder / "held-out.txt").write_text("the cat sat on a mat and saw one hat\n" * 8)
    return folder


def shrunk(folder, name):
    """A YAML file that extends a recipe and changes only widths, depths and sequences of it."""
    stage = stage_of(name)
    widths = {
        field: WIDTHS[field]
        for field in load_recipe(name, stage)["config_overrides"]
        if field in WIDTHS
    }
    changes = {**SEQUENCES, "config_overrides": widths}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"extends": name, stage.value: changes}))
    return path


def command(here, name, output, *extra):
    """The words of a user who trains a shrunk recipe."""
    stage = stage_of(name)
    words = [
        STAGES[stage].command,
        f"--config={shrunk(here, name)}",
        f"--train_file={here / 'text'}",
        f"--validation_file={here / 'held-out.txt'}",
        f"--cache_dir={here / 'cache'}",
        f"--output_dir={output}",
        "--use_cpu",
        "--disable_tqdm=true",
        *extra,
    ]
    if stage is Stage.CALM:
        words.append(f"--ae_name_or_path={here / 'autoencoder'}")
    return words


def step(here, name, *extra):
    """The folder of a shrunk recipe that has been trained for a step."""
    output = here / name
    assert calm(*command(here, name, output, *extra)) == 0
    return output


@pytest.fixture(scope="module")
def autoencoder(here):
    """The shrunk autoencoder after its step."""
    return step(here, "autoencoder", *ON_A_CPU)


def check_step(folder, name):
    """The step that a run took is the recipe's."""
    stage = stage_of(name)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    (loss,), (norm,) = logs(folder, "loss"), logs(folder, "grad_norm")
    assert math.isfinite(loss) and 0 < norm < math.inf
    results = json.loads((folder / "eval_results.json").read_text())
    metric = load_recipe(name, stage).get("metric_for_best_model", "loss")
    assert math.isfinite(results[f"eval_{metric}"])
    protocol = json.loads((folder / "protocol.json").read_text())
    assert protocol["train_files"] == ["text"] and protocol["train"]["streaming"] is False
    training = protocol["training"]
    assert training.items() >= TRAINING.items() and protocol["seed"] == 1
    assert training["bf16"] is has_bfloat16_units(torch.device("cpu"))
    accumulated = int(load_recipe(name, stage)["gradient_accumulation_steps"])
    assert training["gradient_accumulation_steps"] == accumulated
    check_optimizer(folder / "checkpoint-1", SCHEDULES[stage][0])
    config = json.loads((folder / "config.json").read_text())
    assert {field: config.get(field) for field in LOSSES[stage]} == LOSSES[stage]
    return config


def check_optimizer(checkpoint, warmup):
    """AdamW with the paper's settings has updated every weight that is trained, once."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    decays = []
    for group in saved["param_groups"]:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8) and group["fused"]
        assert group["lr"] == pytest.approx(3e-4 / warmup)
        decays.append(group["weight_decay"])
    assert sorted(decays) == [0.0, 0.1]
    frozen = [weight for weight in saved_shapes(checkpoint) if weight.startswith("ae_model.")]
    moments = [entry["exp_avg"] for entry in saved["state"].values()]
    assert len(moments) == len(saved_shapes(checkpoint)) - len(frozen)
    assert all(entry["step"] == 1 for entry in saved["state"].values())
    assert any(moment.any() for moment in moments)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shrunk_copy_takes_a_step(name, here, autoencoder):
    folder = autoencoder if name == "autoencoder" else step(here, name, *ON_A_CPU)
    config = check_step(folder, name)
    if stage_of(name) is Stage.CALM:
        head = {"calm-m-diffusion": "diffusion", "calm-m-flow": "flow"}.get(name, "energy")
        assert config["head_type"] == head
        assert config["head_recompute"] is (name == "calm-xl")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["calm-m", "baseline-s"])
def test_a_shrunk_copy_takes_a_step_with_workers_and_compiled_layers(name, here, autoencoder):
    check_step(step(here, name, "--overwrite_output_dir"), name)


def test_text_that_is_not_prepared(here, tmp_path, capsys):
    """An error says how to prepare it; a stream trains."""
    raw = (*ON_A_CPU, f"--train_file={here / 'text.jsonl'}", "--tokenizer_name=bytes")
    refused = error_of(capsys, *command(here, "baseline-s", tmp_path / "no", *raw))
    assert f"require_prepared: {here / 'text.jsonl'} is no folder of calm prepare" in refused
    assert f"calm prepare --data {here / 'text.jsonl'} --tokenizer" in refused
    assert "--train_file FOLDER" in refused and "--streaming" in refused
    one = ("--gradient_accumulation_steps=1", "--stream_lanes=4")
    words = command(here, "baseline-s", tmp_path / "stream", *raw, *one, "--streaming")
    assert calm(*words) == 0
    train = json.loads((tmp_path / "stream" / "protocol.json").read_text())["train"]
    assert train["streaming"] is True and train["lanes"] == 4
