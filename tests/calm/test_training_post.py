"""Jobs that learn from rewards: what learns, resuming, a limit that ends a run, what is refused."""

import json
import shutil

import pytest
import tiny
from training_cases import MAIN, flags, history, logs, make_trainer, train

from calm import EnergyTransformer
from calm.data.tokenizer import byte_tokenizer
from calm.errors import UserError
from calm.training import post_train
from calm.training.flags.recipe import Stage, load_recipe, recipe_stages
from calm.training.objectives.post_training import PostTrainingArguments


def learner(method):
    model = tiny.model()
    options = PostTrainingArguments(method=method, num_draws=4, reward="repetition:1")
    post_train.learn_from(model, options, byte_tokenizer())
    return model


@pytest.mark.parametrize("method", ["tilted", "policy"])
def test_a_resumed_run_is_that_which_never_stopped(method, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "sequences": 16}
    whole = train(learner(method), tmp_path, **saving)
    again = make_trainer(learner(method), tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("loss", "grad_norm", "reward", "old_reward", "energy_distance"):
        assert len(history(again, name)) == 4
        assert history(again, name) == history(whole, name), name
    learned = "mlp_generator.noise_policy." if method == "policy" else "mlp_generator."
    before = learner(method).state_dict()
    for name, weight in whole.model.state_dict().items():
        assert weight.equal(again.model.state_dict()[name]), name
        assert weight.equal(before[name]) != name.startswith(learned), name
    measured = whole.evaluate()
    assert measured == {**whole.evaluate(), **_times(measured)}
    names = {"loss", "reward", "old_reward", "energy_distance"}
    names |= {"effective_draws"} if method == "tilted" else set()
    assert {f"eval_{name}" for name in names} == set(measured) - set(_times(measured))


def _times(measured):
    return {n: v for n, v in measured.items() if n.endswith(("runtime", "second")) or n == "epoch"}


def post(trained_calm, folder, *extra):
    words = (f"--model_name_or_path={trained_calm / 'calm'}", "--num_draws=4", "--do_train", *extra)
    return MAIN["post"](flags(folder, "post", *words, text=str(trained_calm / "text.jsonl")))


class TestProgram:
    def test_a_limit_ends_a_run_which_then_stays_ended(
        self, trained_calm, tmp_path, caplog, capsys
    ):
        folder, limit = tmp_path / "post", ("--max_energy_distance=1e-4", "--max_steps=40")
        assert post(trained_calm, tmp_path, "--do_eval", *limit) == 0
        distances, steps = logs(folder, "energy_distance"), logs(folder, "loss")
        assert distances[-1] > 1e-4 and max(distances[:-1], default=0) <= 1e-4
        assert len(steps) < 40 and "exceeds max_energy_distance" in caplog.text
        assert (folder / f"checkpoint-{len(steps)}").is_dir()
        protocol = json.loads((folder / "protocol.json").read_text())
        assert protocol["stage"] == "post" and protocol["options"]["reward"] == "brier"
        results = json.loads((folder / "eval_results.json").read_text())
        assert "eval_reward" in results and "eval_energy_distance" in results
        weights = (folder / "model.safetensors").read_bytes()
        assert post(trained_calm, tmp_path, *limit) == 0
        assert (folder / "model.safetensors").read_bytes() == weights
        assert logs(folder) == steps
        old, new = (
            EnergyTransformer.from_pretrained(at).eval() for at in (trained_calm / "calm", folder)
        )
        assert old.config.to_diff_dict() == new.config.to_diff_dict()
        other = shutil.copytree(folder, tmp_path / "other")  # another old model
        assert post(trained_calm, tmp_path, *limit, f"--model_name_or_path={other}") == 2
        assert "a run cannot go on from" in (error := capsys.readouterr().err)
        assert "source" in error

    def test_a_reward_that_fails_leaves_the_last_checkpoint(
        self, trained_calm, tmp_path, monkeypatch, capsys
    ):
        (tmp_path / "failing_reward.py").write_text(
            "calls = 0\n"
            "def score(contexts, continuations):\n"
            "    global calls\n"
            "    calls += 1\n"
            "    if calls > 6:  # twice a step\n"
            "        raise RuntimeError('enough')\n"
            "    return [float(len(text)) for text in continuations]\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        words = ("--reward=failing_reward:score", "--method=policy")
        assert post(trained_calm, tmp_path, *words) == 2
        error = capsys.readouterr().err
        assert "reward failing_reward:score raised RuntimeError for continuation" in error
        assert "failing_reward.py" in error
        assert (tmp_path / "post" / "checkpoint-2" / "model.safetensors").is_file()
        __import__("failing_reward").calls = -100
        assert post(trained_calm, tmp_path, *words) == 0
        assert len(logs(tmp_path / "post")) == 4
        assert EnergyTransformer.from_pretrained(tmp_path / "post").config.noise_policy is True

    @pytest.mark.parametrize(
        ("words", "part"),
        [
            (["--model_name_or_path="], "model_name_or_path is needed: the folder of a trained"),
            (["--method=ppo"], "method must be one of tilted, policy, got 'ppo'"),
            (["--weighting=hard"], "weighting must be one of softmax, signed"),
            (["--reward_reads=latents"], "reward_reads must be one of text, tokens"),
            (["--reward=best"], "reward must be brier, length"),
            (["--num_draws=1"], "num_draws must be at least 2, got 1"),
            (["--num_draws=2", "--method=policy"], "num_draws must be at least 3 for method"),
            (["--num_draws=100000000000"], "num_draws=100000000000"),
            (["--method=policy", "--weighting=signed"], "weighting has no effect with method=pol"),
            (["--advantage_scale=2"], "advantage_scale has no effect with weighting=softmax"),
            (["--weighting=signed", "--reward_temperature=2"], "reward_temperature has no effect"),
            (["--max_energy_distance=1", "--logging_strategy=no"], "got logging_strategy=no"),
            (["--max_energy_distance=1", "--logging_steps=5"], "logging_steps=5 in a run of 4"),
            (["--bf16_full_eval"], "bf16_full_eval must be false"),
            (["--reward_temperature=0"], "reward_temperature must be above 0"),
            (["--old_weight=-1"], "old_weight must be at least 0"),
            (["--metric_for_best_model=brier_lm"], "must be one of loss, reward, old_reward"),
        ],
        ids=[
            "model", "method", "weighting", "reads", "reward", "draws", "brier", "memory",
            "policy", "softmax", "signed", "no-log", "late-log", "bf16", "beta", "old", "metric",
        ],
    )  # fmt: skip
    def test_mistakes(self, words, part, trained_calm, tmp_path, capsys):
        assert post(trained_calm, tmp_path, *words) == 2
        assert part in capsys.readouterr().err

    def test_another_head(self, monkeypatch):
        monkeypatch.setattr(post_train.train_calm, "build_model", lambda *_: tiny.model("flow"))
        arguments = type("Job", (), {"model": type("Model", (), {"model_name_or_path": "runs/f"})})
        with pytest.raises(UserError, match="runs/f has a flow head; an energy head alone"):
            post_train.build_model(arguments, None)

    def test_recipes_of_the_demo_have_the_stage(self):
        for name in ("tiny", "desk", "demo"):
            assert Stage.POST in recipe_stages(name)
            assert load_recipe(name, Stage.POST)["tokenizer_name"] == "bytes"
