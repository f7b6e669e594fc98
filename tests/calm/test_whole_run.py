"""A user's whole way through the command line: train, be killed, resume, evaluate, generate."""

import json
import signal
import subprocess
import sys
import time

import pytest
from training_cases import flags, logs, write_corpus

CALM = (sys.executable, "-m", "calm.cli")
TIMEOUT = 120


def calm(*words):
    done = subprocess.run([*CALM, *words], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after(folder, *words):
    """Start a job and kill it without warning once `folder` exists."""
    process = subprocess.Popen([*CALM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + TIMEOUT
    while not folder.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, f"{folder.name} never came"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.long
@pytest.mark.timeout(900)  # seven programs, one after the other, each of which imports torch
def test_train_kill_resume_evaluate_generate(tmp_path):
    text = write_corpus(tmp_path)
    calm("train-ae", *flags(tmp_path, "autoencoder", text=text))
    autoencoder = f"--ae_name_or_path={tmp_path / 'autoencoder'}"
    steps = ("--max_steps=60", "--save_steps=5", "--save_total_limit=2")
    words = ("train", *flags(tmp_path, "calm", autoencoder, *steps, text=text))
    folder = tmp_path / "calm"

    kill_after(folder / "checkpoint-10", *words)
    assert not (folder / "model.safetensors").exists()
    calm(*words)
    resumed = logs(folder)
    folder.rename(tmp_path / "resumed")
    calm(*words)
    assert resumed == logs(folder) and len(resumed) == 60

    record = tmp_path / "brier.json"
    table = calm(
        "eval", "--model", str(folder), "--data", text, "--block-size", "32", "--json", str(record)
    )
    assert "BrierLM" in table
    protocol = json.loads(record.read_text())["protocol"]
    assert protocol["block_size"] == 32
    said = calm(
        "generate", "--model", str(folder), "--prompt", "the cat ", "--max-new-tokens", "16",
        "--temperature", "1",
    )  # fmt: skip
    assert said.startswith("the cat ")
