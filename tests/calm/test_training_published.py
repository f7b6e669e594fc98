"""The published shell scripts, flag by flag, on texts and sizes for a test.

Each text below holds the flags of one script as published. `shrink` replaces the values that a user
changes too (paths, sizes, batches, steps); every flag stays.
"""

import asyncio
import json
import logging
import math
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pytest
from training_cases import MAIN, logs
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm import Autoencoder, BaselineTransformer, EnergyTransformer
from calm.data.embedded import embedded_corpus
from calm.data.tokenizer import train_bpe_tokenizer
from calm.models import MODEL_CLASSES

ROOT = Path(__file__).resolve().parents[2]

# The four scripts that train on many files share these.
TRAINING = """
    --keep_linebreaks True
    --weight_decay 0.1
    --warmup_steps 2000
    --adam_beta1 0.9
    --adam_beta2 0.95
    --max_grad_norm 1.0
    --streaming
    --seed 1
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 1
    --num_train_epochs 1
    --max_steps 250000
    --save_strategy steps
    --save_steps 50000
    --evaluation_strategy steps
    --eval_steps 1000
    --learning_rate 3e-4
    --lr_scheduler_type constant
    --logging_steps 100
    --do_train
    --do_eval
    --save_safetensors False
    --output_dir $CHECKPOINT_PATH
    --overwrite_output_dir
    --bf16 True
"""
TRAIN_AUTOENCODER = """
    --tokenizer_name $TOKENIZER_PATH
    --config_overrides latent_size=128,num_encoder_layers=2,num_decoder_layers=2,patch_size=4
    --train_file $DATASET_TRAIN
    --validation_file $DATASET_VALID
    --keep_linebreaks True
    --weight_decay 0.1
    --warmup_steps 1000
    --block_size 2048
    --adam_beta1 0.9
    --adam_beta2 0.95
    --max_grad_norm 1.0
    --streaming
    --seed 1
    --per_device_train_batch_size 8
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 4
    --num_train_epochs 1
    --max_steps 30000
    --save_strategy steps
    --save_steps 10000
    --evaluation_strategy steps
    --eval_steps 1000
    --learning_rate 3e-4
    --lr_scheduler_type constant
    --logging_steps 100
    --do_train
    --do_eval
    --save_safetensors False
    --output_dir $CHECKPOINT_PATH
    --overwrite_output_dir
    --bf16 True
"""
SIZES = (
    "latent_size=128,num_mlp_layers=4,patch_size=4,hidden_size=1024,intermediate_size=2752,"
    "num_hidden_layers=16,num_attention_heads=16,num_key_value_heads=16"
)
TRAIN_CALM = f"""
    --ae_name_or_path $AE_PATH
    --tokenizer_name $TOKENIZER_PATH
    --train_file $DATASET_TRAIN
    --validation_file $DATASET_VALID
    --config_overrides {{head}}{SIZES}
    --block_size 8192
    --gradient_accumulation_steps 8
    {TRAINING}
"""
TRAIN_ENERGY = TRAIN_CALM.format(head="")
TRAIN_DIFFUSION = TRAIN_CALM.format(head="model_type=diffusion,")
TRAIN_FLOW = TRAIN_CALM.format(head="model_type=flow,")
TRAIN_AR = f"""
    --model_type llama
    --tokenizer_name $TOKENIZER_PATH
    --config_overrides hidden_size=768,intermediate_size=2048,num_hidden_layers=12,\
num_attention_heads=16,num_key_value_heads=16
    --train_file $DATASET_TRAIN
    --validation_file $DATASET_VALID
    --block_size 2048
    --gradient_accumulation_steps 32
    {TRAINING}
"""
EVAL_ENERGY = """
    --ae_name_or_path $AE_PATH
    --model_name_or_path $CHECKPOINT_PATH
    --validation_file $DATASET_VALID
    --seed 1
    --per_device_eval_batch_size 1
    --do_eval
    --output_dir $CHECKPOINT_PATH
    --bf16 True
"""

SMALLER = {
    "--block_size": "64",
    "--gradient_accumulation_steps": "2",
    "--max_steps": "2",
    "--save_steps": "2",
    "--eval_steps": "2",
    "--logging_steps": "1",
}
SMALLER_SIZES = {
    "latent_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_mlp_layers": 1,
}


def shrink(flags, paths):
    """Words of the command line `flags`, with tiny sizes, few steps and `paths` for variables."""
    words = flags.split()
    for index, (flag, value) in enumerate(zip(words, [*words[1:], ""], strict=True)):
        if flag == "--config_overrides":
            fields = dict(field.split("=") for field in value.split(","))
            tiny = {name: SMALLER_SIZES.get(name, fields[name]) for name in fields}
            words[index + 1] = ",".join(f"{name}={size}" for name, size in tiny.items())
        elif flag in SMALLER:
            words[index + 1] = SMALLER[flag]
        elif value.startswith("$"):
            words[index + 1] = str(paths[value[1:]])
    return words


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """What the scripts' variables name: docstrings in files, and a tokenizer without pad token."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:  # one package of the library is text enough
        library = {"stdlib": str(Path(asyncio.__file__).parent)}
        patch.setattr(sysconfig, "get_paths", lambda: library)
        texts = embedded_corpus("embedded:docstrings")
    assert len(texts) > 100
    files = {"00.text.jsonl": texts[:50], "01.text.jsonl": texts[50:95], "test.json": texts[98:100]}
    for name, documents in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / name).write_text(lines)
    trained = train_bpe_tokenizer(texts[:50], 300)
    PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        bos_token=trained.bos_token,
        eos_token=trained.eos_token,
    ).save_pretrained(folder / "tokenizer")
    return {
        "WORK_PATH": folder,
        "TOKENIZER_PATH": folder / "tokenizer",
        "AE_PATH": folder / "autoencoder",
        "DATASET_TRAIN": f"{folder / '00.text.jsonl'},{folder / '01.text.jsonl'}",
        "DATASET_VALID": folder / "test.json",
    }


def run(stage, flags, paths, name, *extra):
    """Run the script with `flags` into the folder `name`, which is returned; `extra` flags win."""
    output = paths["WORK_PATH"] / name
    assert MAIN[stage]([*shrink(flags, {**paths, "CHECKPOINT_PATH": output}), *extra]) == 0
    return output


def check_trained(folder):
    """A run of two steps left weights, a finite loss, an evaluation and the appended pad token."""
    assert len(logs(folder)) == 2 and all(map(math.isfinite, logs(folder)))
    assert math.isfinite(json.loads((folder / "eval_results.json").read_text())["eval_loss"])
    assert (folder / "checkpoint-2" / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", len(tokenizer) - 1)
    return tokenizer


@pytest.fixture(scope="module")
def autoencoder(paths):
    return run("autoencoder", TRAIN_AUTOENCODER, paths, "autoencoder")


def test_train_autoencoder(autoencoder):
    tokenizer = check_trained(autoencoder)
    config = Autoencoder.from_pretrained(autoencoder).config
    assert (config.vocab_size, config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)


@pytest.mark.usefixtures("autoencoder")
@pytest.mark.parametrize(
    ("head", "flags"),
    [pytest.param("diffusion", TRAIN_DIFFUSION, marks=pytest.mark.slow), ("flow", TRAIN_FLOW)],
)
def test_train_diffusion_and_flow(paths, head, flags):
    folder = run("calm", flags, paths, head)
    check_trained(folder)
    assert MODEL_CLASSES[head].from_pretrained(folder).config.head_type == head


@pytest.mark.usefixtures("autoencoder")
def test_train_energy_then_eval_energy(paths, caplog):
    with caplog.at_level(logging.INFO, logger="calm"):
        folder = run("calm", TRAIN_ENERGY, paths, "energy")
    check_trained(folder)
    weights = EnergyTransformer.from_pretrained(folder).state_dict()
    said = [record.getMessage() for record in caplog.records]
    assert sum("appended [PAD]" in line for line in said) == 1
    assert sum("bf16 without a GPU: running on the CPU" in line for line in said) == 1
    (folder / "eval_results.json").unlink()
    assert run("calm", EVAL_ENERGY, paths, "energy", "--eval_num_samples=2") == folder
    results = json.loads((folder / "eval_results.json").read_text())
    assert math.isfinite(results["eval_loss"]) and "eval_brier_lm" in results
    after = EnergyTransformer.from_pretrained(folder).state_dict()
    assert all(weight.equal(after[name]) for name, weight in weights.items())


@pytest.mark.parametrize("units", [True, False])
def test_bf16_without_a_gpu(paths, monkeypatch, caplog, units):
    """The processor's bfloat16 where it has units for it, else float32; it trains either way."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("calm.training.flags.arguments.has_bfloat16_units", lambda device: units)
    less = "--block_size 16 --per_device_train_batch_size 1 --eval_strategy no --do_eval False"
    folder = run("autoencoder", TRAIN_AUTOENCODER, paths, f"bf16-{units}", *less.split())
    assert len(logs(folder)) == 2 and all(map(math.isfinite, logs(folder)))
    assert json.loads((folder / "protocol.json").read_text())["training"]["bf16"] is units
    (said,) = [text for text in caplog.messages if "bf16 without a GPU" in text]
    assert "running on the CPU" in said and ("in float32" in said) is not units


@pytest.mark.long
def test_train_ar_under_torchrun(paths):
    """As the script launches it, with two processes instead of eight."""
    output = paths["WORK_PATH"] / "ar"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),  # torchrun
            *("--nnodes", "1", "--node_rank", "0", "--nproc_per_node", "2"),
            *("--master_port", str(port), "-m", "calm.training.train_ar"),
            *shrink(TRAIN_AR, {**paths, "CHECKPOINT_PATH": output}),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = check_trained(output)
    assert BaselineTransformer.from_pretrained(output).config.vocab_size == len(tokenizer)
    for once in ("old flags: ", "appended [PAD]", "running on the CPU"):
        assert done.stderr.count(once) == 1, done.stderr
