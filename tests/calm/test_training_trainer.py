"""The trainer: draws whatever the split of a batch, logs, evaluation, bad losses, time."""

import functools
import inspect
import math
from typing import ClassVar

import pytest
import torch
from training_cases import MODELS, Sequences, history, make_trainer, train
from transformers import Trainer

from calm.errors import UserError
from calm.evaluation import evaluate
from calm.training.flags.arguments import CALMTrainingArguments
from calm.training.monitoring import metrics
from calm.training.monitoring.metrics import NonFiniteLossError
from calm.training.text.draws import DrawAddress
from calm.training.text.loading import LoadingTrainer
from calm.training.trainer import CALMTrainer

EXACT = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
}


def same_weights(left, right, **tolerance):
    pairs = zip(left.state_dict().items(), right.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, **tolerance) for (_, a), b in pairs)


class TestTransformers:
    """What the trainer replaces inside transformers' `Trainer`, and that it is still used."""

    # Methods that are private, or public and rarely replaced: their parameters in transformers.
    REPLACED: ClassVar = {
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "set_initial_training_values": ["self", "args", "dataloader"],
    }

    def test_no_other_private_method_is_replaced(self):
        own = {*vars(CALMTrainer), *vars(LoadingTrainer)}
        private = {name for name in own if name[0] == "_" and name[1] != "_"}
        replaced = {name for name in private if hasattr(Trainer, name)}
        assert replaced == {"_get_grad_norm"}

    @pytest.mark.parametrize("name", REPLACED)
    def test_each_is_called_with_the_parameters_it_had(self, tmp_path, monkeypatch, name):
        original = getattr(Trainer, name, None)
        assert original, f"transformers' Trainer has no {name} any more: CALMTrainer replaces it"
        found = list(inspect.signature(original).parameters)
        assert found == self.REPLACED[name], f"transformers changed the parameters of {name}"
        calls = []

        def spy(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(Trainer, name, spy)
        train(MODELS["baseline"](), tmp_path)
        expected = 2 if name == "_get_grad_norm" else 1
        assert len(calls) == expected, f"Trainer.train no longer calls {name} as it did"

    def test_a_step_gets_its_batches_and_counts_in_one_call(self, tmp_path, monkeypatch):
        wanted = ["self", "epoch_iterator", "num_batches", "device"]
        found = list(inspect.signature(Trainer.get_batch_samples).parameters)
        assert found == wanted, "transformers changed the parameters of get_batch_samples"
        original, calls = CALMTrainer.get_batch_samples, []

        def spy(*args):
            calls.append(original(*args))
            return calls[-1]

        monkeypatch.setattr(CALMTrainer, "get_batch_samples", spy)
        train(MODELS["baseline"](), tmp_path)
        told = "Trainer.train no longer calls get_batch_samples once a step"
        assert [len(batches) for batches, _ in calls] == [1, 1], told

    def test_a_gradient_norm_is_what_get_grad_norm_returns(self, tmp_path):
        trainer = train(MODELS["baseline"](), tmp_path)
        norm = trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(3.0))
        assert norm == 3, "Trainer._get_grad_norm no longer hands on the norm of clipping"

    def test_initial_values_begin_with_epochs_and_end_with_steps(self, tmp_path):
        trainer = make_trainer(MODELS["baseline"](), tmp_path, max_steps=5, sequences=16)
        loader = trainer.get_train_dataloader()
        values = Trainer.set_initial_training_values(trainer, trainer.args, loader)
        told = "Trainer.set_initial_training_values returns other values than it did"
        assert (len(values), values[:2], values[-1]) == (7, (3, 2), 5), told

    @pytest.mark.parametrize("how", ["folder", True])
    def test_a_finished_run_takes_no_further_step(self, tmp_path, how):
        """In the middle of an epoch, where transformers would take one."""
        settings = {"sequences": 24, "save_strategy": "steps", "save_steps": 2}
        whole = train(MODELS["baseline"](), tmp_path, **settings)
        again = make_trainer(MODELS["baseline"](), tmp_path, **settings)
        again.train(str(tmp_path / "checkpoint-2") if how == "folder" else how)
        assert again.state.global_step == 2 and history(again, "loss") == history(whole, "loss")
        assert same_weights(whole.model, again.model, atol=0, rtol=0)

    def test_the_callers_arguments_stay_as_they_are(self, tmp_path):
        arguments = CALMTrainingArguments(str(tmp_path), save_total_limit=1, use_cpu=True)
        CALMTrainer(MODELS["baseline"](), arguments)
        assert arguments.save_total_limit == 1


class TestDraws:
    @pytest.mark.parametrize("name", MODELS)
    def test_accumulation_changes_nothing(self, tmp_path, name):
        whole = train(MODELS[name](), tmp_path, per_device_train_batch_size=8, **EXACT)
        parts = train(
            MODELS[name](),
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            **EXACT,
        )
        for measure in ("loss", "grad_norm"):
            assert history(parts, measure) == pytest.approx(history(whole, measure), rel=1e-4)
        assert same_weights(whole.model, parts.model, atol=1e-5)

    @pytest.mark.parametrize("name", ["autoencoder", "energy", "diffusion", "flow"])
    def test_the_address_of_a_sequence_matters(self, tmp_path, monkeypatch, name):
        split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **EXACT}
        right = train(MODELS[name](), tmp_path, **split)
        monkeypatch.setattr(DrawAddress, "next_first_row", lambda self, step: 0)
        wrong = train(MODELS[name](), tmp_path, **split)
        assert history(right, "loss") != pytest.approx(history(wrong, "loss"), rel=1e-5)

    def test_steps_draw_afresh_and_runs_alike(self, tmp_path):
        still = {**EXACT, "learning_rate": 0.0, "sequences": 8, "per_device_train_batch_size": 8}
        first = train(MODELS["energy"](), tmp_path, **still)
        again = train(MODELS["energy"](), tmp_path, **still)
        other = train(MODELS["energy"](), tmp_path, **{**still, "seed": 6})
        one, two = history(first, "loss")
        assert one != two and history(again, "loss") == [one, two]
        assert history(other, "loss") != pytest.approx([one, two], rel=1e-6)

    def test_processes_and_micro_batches_share_the_rows_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(CALMTrainingArguments, "world_size", 2)
        address = DrawAddress(CALMTrainingArguments(str(tmp_path), use_cpu=True), 3)
        rows = []
        for rank in (0, 1):
            monkeypatch.setattr(CALMTrainingArguments, "process_index", rank)
            # A new step starts at the first micro-batch.
            rows += [address.next_first_row(7 + rank) for _ in range(2)]
        assert rows == [0, 6, 3, 9]

    def test_micro_batches_of_a_step_share_its_seed(self, tmp_path):
        address = DrawAddress(CALMTrainingArguments(str(tmp_path), use_cpu=True), 3)
        one, two, next_step, evaluation = (
            address.seed(*each) for each in ((5, 3), (5, 3), (5, 4), (0, 4))
        )
        assert one is two and one.tolist() == [5, 3]
        assert next_step.tolist() == [5, 4] and evaluation.tolist() == [0, 4]


class TestOptimizer:
    def test_frozen_parameters_stay_out_and_gains_do_not_decay(self, tmp_path):
        trainer = make_trainer(MODELS["energy"](), tmp_path, weight_decay=0.1)
        groups = trainer.create_optimizer().param_groups
        held = {id(weight) for group in groups for weight in group["params"]}
        frozen = {id(weight) for weight in trainer.model.ae_model.parameters()}
        trained = {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
        assert held == trained and not held & frozen
        decay = {group["weight_decay"]: group["params"] for group in groups}
        assert all(weight.dim() == 1 for weight in decay[0.0])
        assert all(weight.dim() == 2 for weight in decay[0.1])

    def test_the_autoencoder_is_not_touched(self, tmp_path):
        model = MODELS["energy"]()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        train(model, tmp_path, learning_rate=0.1)
        changed = {
            name for name, weight in model.state_dict().items() if weight.ne(before[name]).any()
        }
        assert changed and not any(name.startswith("ae_model") for name in changed)


class TestLogs:
    def test_parts_of_the_energy_loss_and_speed(self, tmp_path):
        trainer = train(MODELS["energy"](), tmp_path, logging_steps=2)
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert entry["fidelity"] - entry["diversity"] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["tokens_per_second"] > 0 and "characters_per_second" not in entry

    def test_parts_of_the_autoencoder_loss(self, tmp_path):
        trainer = train(MODELS["autoencoder"](), tmp_path)
        config = trainer.model.config
        for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
            total = (
                config.patch_size * entry["reconstruction_loss"] + config.kl_weight * entry["kl"]
            )
            assert total == pytest.approx(entry["loss"], rel=1e-5)
            assert 0 <= entry["collapsed"] <= 1

    def test_means_run_over_the_logging_interval(self, tmp_path):
        each = train(MODELS["energy"](), tmp_path, max_steps=4, **EXACT)
        pairs = train(MODELS["energy"](), tmp_path, max_steps=4, logging_steps=2, **EXACT)
        singles = history(each, "fidelity")
        means = [sum(singles[:2]) / 2, sum(singles[2:]) / 2]
        assert history(pairs, "fidelity") == pytest.approx(means, rel=1e-5)

    def test_characters_a_second(self, tmp_path):
        trainer = make_trainer(MODELS["energy"](), tmp_path)
        trainer._speed.tokens_per_character = 0.25
        trainer.train()
        for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
            assert entry["characters_per_second"] == pytest.approx(4 * entry["tokens_per_second"])


class TestEvaluation:
    @pytest.mark.parametrize("name", ["autoencoder", "energy", "baseline"])
    def test_moves_nothing(self, tmp_path, name):
        settings = {"max_steps": 6, "sequences": 4, "per_device_train_batch_size": 2}
        without = train(MODELS[name](), tmp_path, **settings)
        with_it = train(MODELS[name](), tmp_path, eval_strategy="steps", eval_steps=1, **settings)
        assert history(with_it, "loss") == history(without, "loss")
        assert len(history(with_it, "eval_loss")) == 6

    @pytest.mark.parametrize("name", MODELS)
    def test_does_not_depend_on_the_batch(self, tmp_path, name):
        model = MODELS[name]()
        results = []
        for batch in (8, 3):
            trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=batch)
            metrics = trainer.evaluate()
            results.append({key: value for key, value in metrics.items() if "_per_" not in key})
        for key in set(results[0]) - {"eval_runtime", "eval_model_preparation_time"}:
            tolerance = 0.05 if key in ("eval_loss", "eval_kl", "eval_collapsed") else 1e-6
            assert results[1][key] == pytest.approx(results[0][key], rel=tolerance), key

    @pytest.mark.parametrize("name", ["energy", "baseline"])
    def test_agrees_with_the_evaluate_command(self, tmp_path, name):
        model = MODELS[name]()
        trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=3, eval_num_samples=5)
        metrics = trainer.evaluate()
        expected = evaluate(model, Sequences(8), num_samples=5, seed=0, batch_size=8)
        assert metrics["eval_brier_lm"] == pytest.approx(expected.brier_lm)
        for order, value in expected.brier.items():
            assert metrics[f"eval_{order}"] == pytest.approx(value, abs=1e-6)
            assert metrics[f"eval_{order}_se"] == pytest.approx(expected.standard_errors[order])

    def test_an_untrained_model_scores_zero(self, tmp_path):
        metrics = make_trainer(MODELS["energy"](), tmp_path).evaluate()
        assert metrics["eval_brier4"] < 0 and metrics["eval_brier_lm"] == 0
        assert 0 <= metrics["eval_spread_ratio"] < 1  # its draws are still narrow


class TestNonFiniteLoss:
    def poisoned(self, tmp_path, monkeypatch, step, value=math.nan, **settings):
        """A trainer whose loss is `value` in the second micro-batch of `step`."""
        trainer = make_trainer(
            MODELS["energy"](),
            tmp_path,
            sequences=40,
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            **settings,
        )
        forward = trainer.model.forward

        @functools.wraps(forward)
        def bad_forward(*args, **kwargs):
            output = forward(*args, **kwargs)
            if (
                trainer.model.training
                and trainer.state.global_step + 1 == step
                and trainer._address._micro_batch == 2
            ):
                output.loss = output.loss * value
            return output

        monkeypatch.setattr(trainer.model, "forward", bad_forward)
        return trainer

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_names_step_rate_norm_and_position(self, tmp_path, monkeypatch, value):
        trainer = self.poisoned(tmp_path, monkeypatch, step=3, value=value, logging_steps=4)
        with pytest.raises(NonFiniteLossError) as caught:
            trainer.train()
        message = str(caught.value)
        assert message.startswith("loss at sequences 2 to 3 of the batch (process 0, epoch 0.2")
        assert f"is {value} in step 3: learning rate 0.01, gradient norm " in message
        assert " at step 2, " in message and f"{math.nan} at step 3" in message
        assert "there is no checkpoint" in message and trainer.state.global_step == 4

    @pytest.mark.parametrize("step", [4, 5])
    def test_bad_weights_are_never_saved(self, tmp_path, monkeypatch, step):
        trainer = self.poisoned(
            tmp_path, monkeypatch, step, logging_steps=100, save_strategy="steps", save_steps=2
        )
        with pytest.raises(
            NonFiniteLossError, match=f"in step {step}: .*last good checkpoint is .*checkpoint-"
        ):
            trainer.train()
        kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
        assert kept == ["checkpoint-2", "checkpoint-4"][: (step - 1) // 2]

    def test_bad_weights_are_never_evaluated_or_left_unnoticed_at_the_end(
        self, tmp_path, monkeypatch
    ):
        for settings in ({"eval_strategy": "steps", "eval_steps": 3}, {}):
            trainer = self.poisoned(tmp_path, monkeypatch, step=2, logging_steps=100, **settings)
            with pytest.raises(NonFiniteLossError, match="in step 2"):
                trainer.train()
                trainer.save_model()
            assert not history(trainer, "eval_loss") and not list(tmp_path.glob("*.safetensors"))

    def test_it_is_found_without_logs_and_no_more_values_are_held(self, tmp_path, monkeypatch):
        """Two losses and a norm a step: full after the second, and the fourth step."""
        monkeypatch.setattr(metrics, "MOST_VALUES", 5)
        trainer = self.poisoned(tmp_path, monkeypatch, step=3, logging_strategy="no")
        with pytest.raises(NonFiniteLossError, match="is nan in step 3"):
            trainer.train()
        assert trainer.state.global_step == 3

    def test_a_gradient_that_is_not_finite_counts(self, tmp_path, monkeypatch):
        trainer = make_trainer(MODELS["energy"](), tmp_path)
        clip = Trainer._clip_grad_norm
        monkeypatch.setattr(
            Trainer, "_clip_grad_norm", lambda self, model: clip(self, model) * math.inf
        )
        with pytest.raises(NonFiniteLossError, match="gradient norm is inf in step 1"):
            trainer.train()


class TestTime:
    def test_stops_in_time_with_the_schedule_at_its_end(self, tmp_path):
        trainer = train(
            MODELS["energy"](),
            tmp_path,
            max_steps=10**9,
            max_train_seconds=1.0,
            learning_rate=0.01,
            lr_scheduler_type="linear",
            warmup_steps=3,
            eval_strategy="steps",
            eval_steps=10**6,
            save_strategy="steps",
            save_steps=10**6,
        )
        steps = trainer.state.global_step
        assert 5 < steps < 10**5 and 1.0 <= trainer.clock.elapsed < 2.0
        rates = history(trainer, "learning_rate")
        assert rates[0] == pytest.approx(0.01 / 3, rel=0.1) and max(rates) > 0.008
        assert rates[-1] < 0.002
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert len(history(trainer, "eval_loss")) == 1  # a last evaluation and checkpoint
        assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
        assert history(trainer, "train_seconds") == sorted(history(trainer, "train_seconds"))

    def test_a_resumed_run_has_the_time_that_is_left(self, tmp_path):
        settings = {"max_train_seconds": 1000.0, "save_strategy": "steps", "save_steps": 1}
        spent = train(MODELS["energy"](), tmp_path, max_steps=1, **settings).clock.elapsed
        trainer = make_trainer(MODELS["energy"](), tmp_path, max_steps=2, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert trainer.clock.elapsed > spent > 0

    def test_a_run_whose_time_is_over_takes_no_further_step(self, tmp_path):
        settings = {"max_train_seconds": 1e-6, "save_strategy": "steps", "save_steps": 1}
        assert train(MODELS["energy"](), tmp_path, max_steps=9, **settings).state.global_step == 1
        again = make_trainer(MODELS["energy"](), tmp_path, max_steps=9, **settings)
        again.train(str(tmp_path / "checkpoint-1"))
        assert again.state.global_step == 1

    def test_schedules_that_look_at_the_loss_cannot_follow_time(self, tmp_path):
        with pytest.raises(UserError, match=r"lr_scheduler_type=.*cannot follow max_train_seconds"):
            train(
                MODELS["energy"](),
                tmp_path,
                max_train_seconds=1.0,
                eval_strategy="steps",
                eval_steps=1,
                metric_for_best_model="loss",
                lr_scheduler_type="reduce_lr_on_plateau",
            )
