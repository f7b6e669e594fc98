"""Two processes on the CPU learn what one learns from the same batches; what torchrun reports."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import run_in_two
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from training_cases import MAIN, flags, logs, write_corpus
from transformers import AutoModel

from calm.training.checkpoints.complete import checkpoint_folders

ROOT = Path(__file__).resolve().parents[2]
# A stream that each process reads for itself, with a worker.
SHARED = (
    "--streaming", "--stream_lanes=4", "--dataloader_num_workers=1",
    '--accelerator_config={"dispatch_batches": false}',
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [(), ("--streaming",), SHARED], ids=["cached", "streaming", "shared"]
)
def test_two_processes_are_one_run_with_twice_the_batch(tmp_path, extra):
    """Different draws on each process (trap 3), every block once, whole checkpoints, one score."""
    text = write_corpus(tmp_path)
    evaluation = ("--do_train", "--do_eval", "--eval_strategy=steps", "--eval_steps=2", *extra)
    common = ("--max_steps=4", "--max_grad_norm=100", "--dataloader_drop_last=True", *evaluation)
    alone = flags(tmp_path, "autoencoder", "--per_device_train_batch_size=4", *common, text=text)
    assert MAIN["autoencoder"](alone) == 0
    single = tmp_path / "autoencoder"
    single.rename(tmp_path / "alone")
    together = flags(tmp_path, "autoencoder", *common, text=text)
    run_in_two(tmp_path, MAIN["autoencoder"], together)
    for name in ("loss", "grad_norm", "kl"):
        expected = logs(tmp_path / "alone", name)
        assert logs(single, name) == pytest.approx(expected, rel=1e-4), name
    # The sequences of a stream's last, short batch may draw otherwise.
    for name in ("eval_accuracy", "eval_kl"):
        assert logs(single, name) == pytest.approx(logs(tmp_path / "alone", name), rel=0.05), name
    models = [AutoModel.from_pretrained(folder) for folder in (single, tmp_path / "alone")]
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert left.allclose(right, atol=1e-4)
    assert [folder.name for folder in checkpoint_folders(single)] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert (single / "checkpoint-4" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    """The same four sequences a step, cut otherwise: the same losses over the next 20 steps."""
    text = write_corpus(tmp_path)
    common = ("--max_train_samples=16", "--save_steps=4", "--max_steps=24")
    words = flags(tmp_path, "autoencoder", *common, text=text)
    run_in_two(tmp_path, MAIN["autoencoder"], words)
    folder = tmp_path / "autoencoder"
    expected = logs(folder)
    for checkpoint in checkpoint_folders(folder)[1:]:
        shutil.rmtree(checkpoint)
    assert MAIN["autoencoder"]([*words, "--gradient_accumulation_steps=2"]) == 0
    assert logs(folder) == pytest.approx(expected, rel=1e-6)
    odd = [*words, "--per_device_train_batch_size=3", "--max_steps=30"]
    assert MAIN["autoencoder"](odd) == 2


@pytest.mark.long
def test_an_error_of_ours_ends_what_torchrun_reports(tmp_path):
    words = flags(tmp_path, "autoencoder", "--block_size=30")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "calm.training.train_autoencoder", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last, border = done.stderr.splitlines()
    assert done.returncode != 0 and set(border) == {"="}
    assert "error: block_size must be a multiple of patch_size" in last


class TestLauncher:
    """torchrun finds the last word of a failed process in a file, and ends its report with it."""

    @pytest.fixture
    def report(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

        def failure():
            return ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))

        return failure

    def test_of_an_error_that_can_be_mended(self, report):
        assert MAIN["baseline"](["--block_size=3x"]) == 2
        assert report().message["message"].startswith("error: argument --block_size")
        assert time.time() - 60 < report().timestamp < time.time()

    def test_of_any_other_error(self, report, monkeypatch):
        def broken(*args):
            raise ZeroDivisionError("seven by zero")

        monkeypatch.setattr("calm.training.job.run_job", broken)
        with pytest.raises(ZeroDivisionError):
            MAIN["baseline"](["--use_cpu"])
        assert report().message["message"] == "ZeroDivisionError: seven by zero"

    def test_only_the_first_process_tells_what_it_does(self, monkeypatch):
        levels = []
        monkeypatch.setattr(logging, "basicConfig", lambda level, **rest: levels.append(level))
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            assert MAIN["baseline"](["--seed=x"]) == 2
        assert levels == [logging.INFO, logging.ERROR]
