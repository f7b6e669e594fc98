"""Spikes of the gradient: found by the median, kept in a file, stopped at or passed over."""

import json

import pytest
import torch
from forked import run_in
from safetensors import safe_open
from spikes_worker import LAST, SAVED, SPIKE, find_spikes, found_in, some_weights, spiky

from calm.errors import UserError
from calm.training.flags.arguments import parse_arguments
from calm.training.flags.recipe import Stage
from calm.training.monitoring.spikes import LEAST, WINDOW, GradientSpikeError, SpikeGuard

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


def kept(folder):
    """The batch of the spike, and what is known of its step."""
    with safe_open(folder / "spikes" / f"step-{SPIKE}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("input_ids", "labels")}
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


class TestRun:
    def test_a_skipped_step_changes_no_weight_and_keeps_its_batch(self, tmp_path, caplog):
        """And a run that is resumed after the first norms skips the same step."""
        saving = {"save_strategy": "steps", "save_steps": SAVED, "logging_steps": 1}
        trainer = spiky(tmp_path, "skip", **saving)
        trainer.train()
        found = found_in(trainer)
        assert found["same"] == [SPIKE]
        assert found["skipped_steps"] == [int(step == SPIKE) for step in range(1, LAST + 1)]
        tensors, known = kept(tmp_path)
        assert tensors["input_ids"].shape == tensors["labels"].shape == (4, 16)
        assert known["step"] == SPIKE and known["norm"] > 10 * known["median"] > 0
        assert "of step 24 is" in caplog.text and "the step is skipped" in caplog.text
        again = spiky(tmp_path, "skip", **saving)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert found_in(again) == found

    def test_a_run_stops_before_the_update(self, tmp_path):
        trainer = spiky(tmp_path, "stop")
        message = r"of step 24 is .* times the median .* the last good checkpoint is none; look at"
        with pytest.raises(GradientSpikeError, match=message):
            trainer.train()
        weights = trainer.watched.after
        assert max(weights) == 23 and weights[23] == some_weights(trainer.model)
        kept(tmp_path)

    @pytest.mark.parametrize(
        "is_sharded",
        [
            pytest.param(False, id="whole"),
            pytest.param(True, id="shards", marks=pytest.mark.long),
        ],
    )
    def test_two_processes_do_what_one_does(self, is_sharded, tmp_path):
        """Both find the spike; the batch has the sequences of both, in the order of one."""
        alone = spiky(tmp_path / "alone", "skip", logging_steps=1)
        alone.train()
        run_in(2, tmp_path, find_spikes, tmp_path, is_sharded)
        batch, known = kept(tmp_path / "alone")
        expected = found_in(alone)
        for rank in range(2):
            results = json.loads((tmp_path / f"{rank}.json").read_text())
            assert results["again"] == results["skip"]
            assert results["skip"]["same"] == [SPIKE]
            assert results["skip"]["skipped_steps"] == expected["skipped_steps"]
            for name in ("loss", "grad_norm"):
                assert results["skip"][name] == pytest.approx(expected[name], rel=1e-5), name
            assert "of step 24 is" in results["error"] and not results["moved"]
            assert results["last"] == SPIKE - 1
        for name in ("skip", "stop"):
            tensors, facts = kept(tmp_path / name)
            assert all(tensors[key].equal(batch[key]) for key in batch)
            assert facts == pytest.approx(known, rel=1e-5)


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
