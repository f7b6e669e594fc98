"""Losses and logged terms are sums and counts, divided once, however a batch was cut."""

import json
import math

import averages_worker
import pytest
import tiny
import torch
from averages_worker import EXACT, MEASURES, scores
from forked import run_in_two
from training_cases import (
    MAIN,
    MODELS,
    UnevenSequences,
    flags,
    history,
    logs,
    make_trainer,
    train,
)

from calm_kernels import use_backend

# `eval_conditioning_share` is a difference of energies, near 0 before a model has learned.
CLOSE = {"rel": 1e-6, "abs": 1e-7}


def unlabelled(count):
    """Sequences without a label."""
    data = UnevenSequences(count)
    data.labels[:] = -100
    return data


class TestForward:
    @pytest.mark.parametrize("name", MODELS)
    def test_parts_add_up_to_the_whole(self, name):
        """Given the counts of the whole, losses and gradients of its parts add up."""
        model = MODELS[name]().train()
        data = UnevenSequences(8)
        ids, labels = torch.from_numpy(data.ids), torch.from_numpy(data.labels)
        draws = {} if name == "baseline" else {"seed": 3}
        whole = model(ids, labels=labels, **draws)
        whole.loss.backward()
        gradients = [w.grad.clone() for w in model.parameters() if w.grad is not None]
        model.zero_grad()
        counts = model.loss_counts(labels)
        total = 0.0
        for first, last in ((0, 1), (1, 2), (2, 6), (6, 8)):
            draws = draws and {"seed": 3, "first_row": first}
            part = {"labels": labels[first:last], "loss_counts": counts, **draws}
            loss = model(ids[first:last], **part).loss
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(whole.loss.item(), rel=1e-6)
        again = [w.grad for w in model.parameters() if w.grad is not None]
        torch.testing.assert_close(again, gradients, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @pytest.mark.parametrize("name", MODELS)
    def test_without_a_label_the_loss_is_zero_with_zero_gradients(self, name, backend):
        model = MODELS[name]().train()
        ids = tiny.tokens(batch=2, chunks=4)
        with use_backend(backend):
            loss = model(ids, labels=torch.full_like(ids, -100)).loss
            loss.backward()
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        assert loss == 0 and gradients and not any(grad.any() for grad in gradients)
        assert model.eval()(ids, labels=torch.full_like(ids, -100)).loss == 0


class TestStep:
    @pytest.mark.parametrize("name", MODELS)
    def test_micro_batches_change_nothing(self, tmp_path, name):
        """Loss, gradient, parts and weights, with blocks of very different numbers of labels."""
        runs = [
            train(
                MODELS[name](),
                tmp_path,
                data=UnevenSequences(8),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=4 // batch,
                **EXACT,
            )
            for batch in (4, 2, 1)
        ]
        whole = runs[0]
        assert len(history(whole, "loss")) == 2
        for parts in runs[1:]:
            for measure in MEASURES:
                expected = history(whole, measure)
                assert history(parts, measure) == pytest.approx(expected, rel=2e-6), measure
            weights = [run.model.state_dict() for run in (whole, parts)]
            torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", MODELS)
    def test_a_step_without_a_label_updates_nothing(self, tmp_path, name):
        model = MODELS[name]()
        before = {key: weight.clone() for key, weight in model.state_dict().items()}
        trainer = train(model, tmp_path, data=unlabelled(8), per_device_train_batch_size=2, **EXACT)
        assert history(trainer, "loss") == history(trainer, "grad_norm") == [0.0, 0.0]
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert math.isnan(trainer.evaluate()["eval_loss"])

    def test_logged_parts_are_means_over_the_interval(self, tmp_path):
        """Also the share of collapsed dimensions: of their mean over all chunks."""
        settings = {"data": UnevenSequences(8), "max_steps": 4, "per_device_train_batch_size": 1}
        still = {**settings, **EXACT, "learning_rate": 0.0}
        build = lambda: tiny.autoencoder(kl_clamp=0.02, ae_dropout=0.0)  # noqa: E731 (used twice)
        long = train(build(), tmp_path, logging_steps=4, **still)
        once = {**still, "max_steps": 1, "per_device_train_batch_size": 4}
        step = train(build(), tmp_path, logging_steps=1, **once)
        for measure in ("kl", "collapsed"):
            assert history(long, measure) == pytest.approx(history(step, measure)), measure


class TestEvaluation:
    @pytest.mark.parametrize("name", MODELS)
    def test_batches_change_nothing(self, tmp_path, name):
        """And the loss is the mean over all that counts, from one sequence after the other."""
        model, data = MODELS[name](), UnevenSequences(6)
        results = []
        for batch in (6, 3, 2, 1):
            settings = {"per_device_eval_batch_size": batch, "eval_num_samples": 2}
            settings["prediction_loss_only"] = name == "diffusion"  # its draws take 100 steps
            trainer = make_trainer(model, tmp_path, data=data, **settings)
            results.append(scores(trainer.evaluate()))
        for found in results[1:]:
            assert found == pytest.approx(results[0], **CLOSE)
        total = count = 0
        for row in range(6):
            ids, labels = (torch.from_numpy(a[row : row + 1]) for a in (data.ids, data.labels))
            draws = {} if name == "baseline" else {"seed": torch.tensor([0, 0]), "first_row": row}
            number = model.loss_counts(labels)[0].item()
            total += number * model.eval()(ids, labels=labels, **draws).loss.item()
            count += number
        assert results[0]["eval_loss"] == pytest.approx(total / count, rel=1e-6)

    @pytest.mark.parametrize("name", ["autoencoder", "energy"])
    def test_of_the_loss_alone(self, tmp_path, name):
        model, data = MODELS[name](), UnevenSequences(6)
        whole = make_trainer(model, tmp_path, data=data).evaluate()
        alone = make_trainer(model, tmp_path, data=data, prediction_loss_only=True).evaluate()
        assert scores(alone) == {"eval_loss": whole["eval_loss"]}


def test_a_last_block_of_one_token_trains(tmp_path):
    """The baseline predicts nothing in it."""
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 24)  # 96 bytes and the end of the document: three blocks and a token
    words = ["--validation_split_percentage=0", "--per_device_train_batch_size=1", "--do_train"]
    assert MAIN["baseline"](flags(tmp_path, "baseline", *words, text=text)) == 0
    losses = logs(tmp_path / "baseline")
    assert len(losses) == 4 and min(losses) == 0 and math.isfinite(max(losses))


class TestTrainLoss:
    def test_is_the_mean_of_all_steps(self, tmp_path):
        trainer = make_trainer(MODELS["energy"](), tmp_path, max_steps=5, sequences=40)
        output = trainer.train()
        losses = history(trainer, "loss")
        assert output.training_loss == output.metrics["train_loss"]
        assert output.training_loss == pytest.approx(sum(losses) / 5)
        assert make_trainer(MODELS["energy"](), tmp_path).train().training_loss != 0

    def test_after_a_resume(self, tmp_path):
        """Between two logs, so that the checkpoint holds steps that no log has seen."""
        settings = {
            "max_steps": 6,
            "sequences": 48,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        whole = make_trainer(MODELS["energy"](), tmp_path, **settings).train()
        again = make_trainer(MODELS["energy"](), tmp_path, **settings)
        resumed = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert resumed.training_loss == pytest.approx(whole.training_loss, rel=1e-12)
        assert history(again, "train_loss") == [resumed.training_loss]
        finished = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert finished.training_loss == resumed.training_loss


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Also where an epoch or an evaluation set ends, and sequences are repeated to fill batches."""
    run_in_two(tmp_path, averages_worker.main, tmp_path, 2, 3)
    together = json.loads((tmp_path / "results.json").read_text())
    alone, _ = averages_worker.run(tmp_path / "alone", 4, 4)
    for name in MODELS:
        for measure, values in alone[name]["logs"].items():
            found = together[name]["logs"][measure]
            assert found == pytest.approx(values, rel=1e-5), (name, measure)
        for part in ("train_loss", "scores", "stream"):
            assert together[name][part] == pytest.approx(alone[name][part], rel=1e-5, abs=1e-7), (
                part
            )
