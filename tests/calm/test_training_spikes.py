"""Spikes of the gradient: found by the median, kept in a file, stopped at or passed over."""

import json

import pytest
import torch
from safetensors import safe_open
from training_cases import MODELS, history, make_trainer
from transformers import TrainerCallback

from calm.errors import UserError
from calm.training.arguments import parse_arguments
from calm.training.recipe import Stage
from calm.training.spikes import LEAST, WINDOW, GradientSpikeError, SpikeGuard

BATCH = [{name: torch.tensor([[1, 2], [3, 4]]) for name in ("input_ids", "labels")}]


def guard(folder, policy="skip", gather=lambda tensor: tensor):
    return SpikeGuard(3.0, policy, folder, gather)


def found(watch, norms):
    """The steps, from 0, that are spikes among these norms."""
    return [step for step, norm in enumerate(norms) if watch.skips(norm, step, 0.1, BATCH)]


class TestMedian:
    def test_a_spike_is_far_above_the_median_of_the_norms_before_it(self, tmp_path):
        norms = [1.0, 2.0, 3.0] * 10
        norms[LEAST - 1] = 100.0  # too early
        norms += [6.0, 6.1, float("nan"), float("inf"), 6.2]  # the median is 2; others' matter
        assert found(guard(tmp_path), norms) == [31, 34]

    def test_norms_that_stay_large_are_soon_no_spikes(self, tmp_path):
        steps = found(guard(tmp_path), [1.0] * WINDOW + [50.0] * WINDOW)
        assert steps == list(range(WINDOW, WINDOW + WINDOW // 2))

    def test_the_first_process_decides_for_all(self, tmp_path):
        """Norms of two processes, the second of which has other bits."""
        watch = guard(tmp_path, gather=lambda tensor: torch.cat([tensor, 100 * tensor]))
        assert found(watch, [1.0] * 30 + [2.9]) == []
        assert found(watch, [3.1]) == [0]
        with safe_open(tmp_path / "spikes" / "step-0.safetensors", "pt") as file:
            assert file.get_tensor("labels").tolist() == [[1, 2], [3, 4], [100, 200], [300, 400]]


def spiky(folder, monkeypatch, policy, at=24, **settings):
    """A trainer whose loss is multiplied by 10⁴ in one step."""
    trainer = make_trainer(
        MODELS["energy"](), folder, sequences=120, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=28, max_gradient_spike=10.0, on_spike=policy,
        **settings,
    )  # fmt: skip
    compute = trainer.compute_loss

    def spiked(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        return 1e4 * loss if trainer.state.global_step + 1 == at else loss

    monkeypatch.setattr(trainer, "compute_loss", spiked)
    return trainer


class TestRun:
    def test_a_skipped_step_changes_no_weight_and_keeps_its_batch(
        self, tmp_path, monkeypatch, caplog
    ):
        """And a run that is resumed after the first norms skips the same step."""
        saving = {"save_strategy": "steps", "save_steps": 22, "logging_steps": 1}
        trainer, weights = spiky(tmp_path, monkeypatch, "skip", **saving), {}
        trainer.add_callback(_Weights(weights))
        trainer.train()
        changed = [step for step in weights if step > 1 and weights[step] != weights[step - 1]]
        assert sorted(set(range(2, 29)) - set(changed)) == [24]
        assert history(trainer, "skipped_steps") == [int(step == 24) for step in range(1, 29)]
        with safe_open(tmp_path / "spikes" / "step-24.safetensors", "pt") as file:
            known = {name: json.loads(value) for name, value in file.metadata().items()}
            assert file.get_tensor("input_ids").shape == file.get_tensor("labels").shape == (4, 16)
        assert known["step"] == 24 and known["norm"] > 10 * known["median"] > 0
        assert "of step 24 is" in caplog.text and "the step is skipped" in caplog.text
        again = spiky(tmp_path, monkeypatch, "skip", **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-22"))
        for name in ("loss", "grad_norm", "skipped_steps"):
            assert history(again, name) == history(trainer, name), name

    def test_a_run_stops_before_the_update(self, tmp_path, monkeypatch):
        trainer, weights = spiky(tmp_path, monkeypatch, "stop"), {}
        trainer.add_callback(_Weights(weights))
        message = r"of step 24 is .* times the median .* the last good checkpoint is none; look at"
        with pytest.raises(GradientSpikeError, match=message):
            trainer.train()
        assert max(weights) == 23 and weights[23] == _first_weight(trainer.model)
        assert (tmp_path / "spikes" / "step-24.safetensors").is_file()


class _Weights(TrainerCallback):
    """One weight after each step."""

    def __init__(self, weights):
        self.weights = weights

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = _first_weight(model)


def _first_weight(model):
    return model.mlp_generator.output.weight[0].tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_gradient_spike 0.5", "max_gradient_spike must be at least 1, or 0"),
        ("--max_gradient_spike 9 --on_spike ignore", "on_spike must be stop or skip, got 'ignore'"),
        ("--on_spike skip", "on_spike needs max_gradient_spike"),
    ],
)
def test_mistakes(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse_arguments([f"--output_dir={tmp_path}", "--use_cpu", *words.split()], Stage.BASELINE)
