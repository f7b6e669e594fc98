"""Training of a tempered head: a whole job, resuming it, what it refuses."""

import json
import shutil

import pytest
import tiny
import torch
from training_cases import MAIN, flags, history, logs, make_trainer, train

from calm import EnergyTransformer
from calm.errors import UserError
from calm.training.flags.recipe import PRETRAINING, Stage, load_recipe, recipe_stages
from calm.training.objectives.tempering import TemperingArguments

DRAWS = ("--min_draws=8", "--max_draws=12")


class TestRun:
    def test_the_new_head_alone_learns(self, tmp_path):
        model = tiny.temperature_learner()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        train(model, tmp_path, max_steps=3)
        for name, weight in model.state_dict().items():
            assert weight.equal(before[name]) != name.startswith("tempered_head."), name

    def test_a_resumed_run_is_that_which_never_stopped(self, tmp_path):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sequences": 16}
        whole = train(tiny.temperature_learner(), tmp_path, **saving)
        again = make_trainer(tiny.temperature_learner(), tmp_path, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name in ("loss", "grad_norm"):
            assert history(again, name) == history(whole, name), name
        for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert left.equal(right)

    def test_an_evaluation_is_the_loss_alone_and_repeats(self, tmp_path):
        trainer = make_trainer(tiny.temperature_learner(), tmp_path)
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first["eval_loss"] == second["eval_loss"]
        assert not [name for name in first if "brier" in name]


def distill(trained_calm, folder, *extra):
    words = (f"--model_name_or_path={trained_calm / 'calm'}", *DRAWS, *extra)
    return MAIN["temperature"](
        flags(folder, "temperature", *words, text=str(trained_calm / "text.jsonl"))
    )


class TestProgram:
    def test_from_a_trained_model_to_one_that_draws_at_low_temperature(
        self, trained_calm, tmp_path, capsys
    ):
        folder = tmp_path / "temperature"
        assert distill(trained_calm, tmp_path, "--do_train", "--do_eval") == 0
        old = EnergyTransformer.from_pretrained(trained_calm / "calm").eval()
        new = EnergyTransformer.from_pretrained(folder).eval()
        assert new.config.tempered_range == [0.3, 0.8]
        for name, weight in old.state_dict().items():
            assert new.state_dict()[name].equal(weight), name
        ids = torch.randint(256, (2, 8))
        for temperature, is_old in ((1.0, True), (0.5, False)):
            options = {"max_new_tokens": 8, "seed": 1, "method": "amortized"}
            found = new.generate(ids, temperature=temperature, **options)
            assert not is_old or found.equal(old.generate(ids, temperature=1.0, **options))
        protocol = json.loads((folder / "protocol.json").read_text())
        assert protocol["stage"] == "temperature"
        assert protocol["options"] == {
            "min_temperature": 0.3, "max_temperature": 0.8, "min_draws": 8, "max_draws": 12,
            "match_agreement": True,
        }  # fmt: skip
        results = json.loads((folder / "eval_results.json").read_text())
        assert "eval_loss" in results and "eval_brier_lm" not in results
        spread = new.config.tempered_spread
        assert [round(knot[0], 3) for knot in spread] == [0.3, 0.416, 0.577, 0.8]
        weights, losses = (folder / "model.safetensors").read_bytes(), logs(folder)
        again = flags(tmp_path, "calm", f"--model_name_or_path={folder}", "--config_overrides=")
        assert MAIN["calm"](again) == 2
        assert "would not fit any more" in capsys.readouterr().err
        shutil.rmtree(folder / "checkpoint-4")  # stopped, and started again
        assert distill(trained_calm, tmp_path) == 0
        assert (folder / "model.safetensors").read_bytes() == weights and logs(folder) == losses
        assert EnergyTransformer.from_pretrained(folder).config.tempered_spread == spread

    def test_without_matching_the_head_stays_as_it_was_trained(self, trained_calm, tmp_path):
        assert distill(trained_calm, tmp_path, "--match_agreement=False") == 0
        new = EnergyTransformer.from_pretrained(tmp_path / "temperature")
        assert new.config.tempered_spread is None

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (["--model_name_or_path="], "model_name_or_path is needed: the folder of a trained"),
            (["--config_overrides=beta=1.5"], "config_overrides describes a new model"),
            (["--max_temperature=1"], "0 < min <= max < 1"),
            (["--min_draws=0"], "min_draws must be at least 1"),
            (["--max_draws=5"], "and max_draws; got 8 and 5"),
            (["--metric_for_best_model=brier_lm"], "must be one of loss, got 'brier_lm'"),
        ],
        ids=["model", "overrides", "range", "draws", "order", "metric"],
    )
    def test_mistakes(self, words, part, trained_calm, tmp_path, capsys):
        assert distill(trained_calm, tmp_path, *words) == 2
        assert part in capsys.readouterr().err

    def test_another_head(self, tmp_path, monkeypatch):
        from calm.training import distill_temperature as program

        monkeypatch.setattr(program.train_calm, "new_or_trained", lambda *_: tiny.model("flow"))
        arguments = type("Job", (), {"model": TemperingArguments()})
        arguments.model.model_name_or_path = "runs/flow"
        with pytest.raises(UserError, match="runs/flow has a flow head; an energy head alone"):
            program.build_model(arguments, None)

    def test_recipes_of_the_demo_have_the_stage(self):
        for name in ("tiny", "desk", "demo"):
            assert Stage.TEMPERATURE in recipe_stages(name)
            assert load_recipe(name, Stage.TEMPERATURE)["tokenizer_name"] == "bytes"
        assert recipe_stages("calm-m") == list(PRETRAINING)[1:2]
