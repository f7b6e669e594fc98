"""Health of a run: what its logs say beside the loss, and when it warns."""

import pytest
import tiny
import torch
from training_cases import MODELS, Sequences, history, make_trainer
from transformers import TrainerState

from calm.evaluation.measures import measure_text
from calm.training.monitoring import health
from calm.training.monitoring.health import HealthAdvice

NAMES = {
    "reconstruction", "floor_share", "conditioning_share", "spread_ratio", "draw_agreement",
    "vote_margin",
}  # fmt: skip


@pytest.mark.parametrize("head", ["energy", "flow"])
def test_an_evaluation_measures_its_first_sequences(head, tmp_path, monkeypatch):
    """As `calm eval` does on these alone, whatever the batch."""
    monkeypatch.setattr(health, "POSITIONS", 8)  # three chunks are predicted in each sequence
    options = {"data": Sequences(7), "eval_num_samples": 3, "eval_seed": 4}
    model = tiny.model(head)
    found = [
        make_trainer(model, tmp_path, per_device_eval_batch_size=size, **options).evaluate()
        for size in (1, 2, 7)
    ]
    texts = [torch.from_numpy(row) for row in options["data"].ids[:3]]
    expected = measure_text(model, texts, num_samples=3, seed=4).values()
    for name in NAMES - {"spread_ratio" if head == "energy" else ""}:
        for each in found:
            assert each[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_what_is_logged(tmp_path):
    """By a CALM in training and in evaluation; the others have no such numbers."""
    trainer = make_trainer(MODELS["energy"](), tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    ratios, parts = history(trainer, "spread_ratio"), ("fidelity", "diversity")
    fidelity, diversity = (history(trainer, name) for name in parts)
    assert ratios == pytest.approx([2 * d / f for f, d in zip(fidelity, diversity, strict=True)])
    assert all(len(history(trainer, f"eval_{name}")) == 2 for name in NAMES)
    metrics = make_trainer(MODELS["baseline"](), tmp_path).evaluate()
    assert not any(name.removeprefix("eval_") in NAMES for name in metrics)


class TestAdvice:
    @pytest.fixture
    def said(self, caplog):
        """What is said of logs, one after the other, at shares of the training."""

        def of(*logs, progress=0.5, is_first=True):
            watch = HealthAdvice(lambda: progress)
            state = TrainerState(global_step=30, is_world_process_zero=is_first)
            for entry in logs:
                watch.on_log(None, state, None, logs=entry)
            return [record.message.split(":")[:2] for record in caplog.records]

        return of

    def test_what_turns_bad_is_told_once_until_an_evaluation_is_good(self, said):
        bad, good = {"spread_ratio": 0.3}, {"spread_ratio": 1.0}
        evaluated = {"eval_spread_ratio": 1.0}
        line = ["step 30", " spread_ratio is 0.3"]
        assert said({"loss": 9.0, **good}, bad, good, bad) == [line]
        assert said(bad, evaluated, bad, {"eval_spread_ratio": 0.3}) == [line] * 3

    def test_of_an_autoencoder(self, said):
        """Its accuracy in training has dropout in it, that of an evaluation has none."""
        assert said({"accuracy": 0.2, "collapsed": 0.4}) == []
        logs = {"eval_accuracy": 0.2, "eval_collapsed": 0.6, "eval_runtime": 3.0}
        assert [name for _, name in said(logs)] == [
            " collapsed is 0.6", " reconstruction is 0.2"
        ]  # fmt: skip

    def test_not_at_the_beginning_and_by_one_process(self, said):
        bad = {"eval_spread_ratio": 0.3}
        assert said(bad, progress=0.05) == said(bad, is_first=False) == []
        assert said({}, {"loss": 1.0}) == []

    def test_a_run_tells(self, tmp_path, caplog):
        trainer = make_trainer(MODELS["energy"](), tmp_path, max_steps=4)
        trainer.train()
        (line,) = (r.message for r in caplog.records if "spread_ratio" in r.message)
        assert line.startswith("step 1: spread_ratio is 0.") and "num_samples" in line
