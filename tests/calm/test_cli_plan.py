"""`calm plan`: what training and use cost."""

import json

import pytest
import yaml
from cli_cases import calm, error_of
from tiny_models import tiny_baseline

from calm import Autoencoder, AutoencoderConfig
from calm.flops import flops_of


def costs(capsys, *words):
    """Cost of every stage."""
    assert calm("plan", *words, "--json") == 0
    stages = next(iter(json.loads(capsys.readouterr().out).values()))
    return {stage: plan["cost"] for stage, plan in stages.items()}


def test_the_cost_of_calm_m(capsys):
    """0.70 GFLOP to learn a token; 3.7e20 over 5e11 tokens in the paper, 0.74."""
    cost = costs(capsys, "calm-m", "--gpus", 4, "--tokens", "230e9", "--mfu", 0.5)["calm"]
    assert cost["context_positions"] == 2048
    assert cost["training_flop_per_token"] == pytest.approx(0.70e9, rel=0.01)
    assert cost["inference_flop_per_token"] == pytest.approx(2.9e8, rel=0.01)
    assert cost["inference_flop_per_token_of_200_candidates"] == pytest.approx(297e8, rel=0.01)
    assert cost["tokens_per_step"] == 4 * 4 * 8 * 8192
    assert cost["optimizer_steps"] == -(-230_000_000_000 // 1_048_576)
    assert cost["training_flop"] == 230e9 * cost["training_flop_per_token"]
    assert cost["training_seconds"] == cost["training_flop"] / (4 * 989e12 * 0.5)
    assert cost["assumed_mfu"] == 0.5 and cost["assumed_peak_flop_per_second_per_gpu"] == 989e12
    memory = cost["memory_bytes_per_gpu"]
    assert memory["weights"] == 4 * (371_731_584 + 75_831_552)
    assert memory["gradients"] == 4 * 371_731_584 == memory["optimizer"] / 2
    assert memory["total"] == sum(memory.values()) / 2
    assert 5e9 < memory["activations"] < 15e9


def test_tokens_are_those_of_the_recipe(capsys):
    cost = costs(capsys, "calm-m")["calm"]
    assert cost["gpus"] == 8 and cost["optimizer_steps"] == 250_000
    assert cost["training_tokens"] == 250_000 * 2_097_152
    halved = costs(capsys, "calm-m", "--gpus", 4)["calm"]
    assert halved["training_tokens"] == cost["training_tokens"] / 2
    assert halved["training_seconds"] == pytest.approx(cost["training_seconds"])


def test_a_recipe_without_steps_has_no_tokens_of_its_own(capsys):
    unknown = costs(capsys, "demo")
    assert set(unknown) == {"autoencoder", "calm", "baseline"}
    for cost in unknown.values():
        assert "training_flop" not in cost and "memory_bytes_per_gpu" in cost
    for cost in costs(capsys, "demo", "--tokens", 1e6).values():
        assert cost["training_tokens"] == 1e6 and cost["optimizer_steps"] >= 1


def test_candidates_cost_a_baseline_nothing(capsys):
    cost = costs(capsys, "baseline-s")["baseline"]
    assert "inference_flop_per_token_of_200_candidates" not in cost
    assert cost["training_flop_per_token"] == 3 * cost["inference_flop_per_token"]


def test_options_of_the_latent_that_cost(capsys, tmp_path):
    """192 weights of mixed slots and 16 of a norm on each side; a teacher, and what reads it."""
    teacher = tiny_baseline(vocab_size=259)
    teacher.save_pretrained(tmp_path / "teacher")
    recipe = tmp_path / "recipe.yaml"
    sizes = "hidden_size: 16, intermediate_size: 24, latent_size: 8, vocab_size: 259"
    recipe.write_text(
        f"autoencoder:\n  teacher_name_or_path: {tmp_path / 'teacher'}\n  block_size: 64\n"
        f"  config_overrides: {{{sizes}, num_mixing_layers: 1, alignment_weight: 0.5}}\n"
    )
    assert calm("plan", recipe, "--json") == 0
    plan = next(iter(json.loads(capsys.readouterr().out).values()))["autoencoder"]
    assert plan["slot_mixing"] == 2 * (192 + 16) and plan["alignment"] == 8 * 32 + 32
    terms = plan["cost"]["training_terms_flop_per_token"]
    model = Autoencoder(AutoencoderConfig(**yaml.safe_load(f"{{{sizes}}}"), alignment_weight=0.5))
    model.attach_teacher(teacher)
    assert terms == flops_of(model, context=16).training_terms()
    assert calm("plan", recipe) == 0
    shown = capsys.readouterr().out
    assert "slot mixing" in shown and ", alignment " in shown and "% of it" in shown


def test_cost_for_people(capsys):
    assert calm("plan", "calm-m", "--tokens", "230e9") == 0
    text = capsys.readouterr().out
    for part in (
        "0.6999 GFLOP a token", "with 200 candidates", "161 EFLOP for 230,000,000,000 tokens",
        "109,673 of 2,097,152 tokens", "14.1 hours on 8 GPUs at 40% of 989 TFLOP/s", "GiB: weights",
        "4 sequences at once, data parallel, float32 weights, AdamW (by formula)",
    ):  # fmt: skip
        assert part in text, part
    assert calm("plan") == 0
    assert "FLOP" not in capsys.readouterr().out


def test_training_terms_have_their_share(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: desk\ncalm:\n  config_overrides:\n    token_loss_weight: 0.3\n"
        "    token_score_weight: 1.0\n    token_score_start: 0.75\n",
        encoding="utf-8",
    )
    cost, off = costs(capsys, path)["calm"], costs(capsys, "desk")["calm"]
    terms = cost["training_terms_flop_per_token"]
    added = cost["training_flop_per_token"] - off["training_flop_per_token"]
    assert set(terms) == {"token_loss", "token_score"}
    assert sum(terms.values()) == pytest.approx(added)
    assert "training_terms_flop_per_token" not in off
    assert calm("plan", path) == 0
    text = capsys.readouterr().out
    shares = [f"{value / cost['training_flop_per_token']:.1%} of it" for value in terms.values()]
    assert f"token loss {shares[0]}, token score {shares[1]}" in text and "readout" in text
    by_readout = cost["inference_flop_per_token_by_readout"]
    assert f"{by_readout / 1e9:.4g} by its readout" in text
    assert "inference_flop_per_token_by_readout" not in off


@pytest.mark.parametrize("kind", ["calm", "baseline", "ae"])
def test_a_checkpoint_has_costs_but_no_batch(kind, folders, capsys):
    (cost,) = costs(capsys, folders / kind, "--tokens", 100).values()
    assert cost["training_flop"] == 100 * cost["training_flop_per_token"]
    assert not {"optimizer_steps", "memory_bytes_per_gpu", "tokens_per_step"}.intersection(cost)
    assert calm("plan", folders / kind) == 0
    assert "GFLOP a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", 0), "--gpus must be at least 1, got 0"),
        (("--gpus", "two"), "--gpus: invalid int value: 'two'"),
        (("--tokens", "nan"), "--tokens must be in [1, 1e+18], got nan"),
        (("--tokens", "1e308"), "--tokens must be in [1, 1e+18], got 1e308"),
        (("--tokens", "many"), "--tokens: invalid float value: 'many'"),
        (("--mfu", 0), "--mfu must be in (0, 1], got 0"),
        (("--mfu", 1.5), "--mfu must be in (0, 1], got 1.5"),
    ],
)
def test_mistakes(words, message, capsys):
    assert message in error_of(capsys, "plan", "calm-m", *words)


@pytest.mark.parametrize("value", ["-3", "many"])
def test_a_recipe_of_impossible_batches(value, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"baseline:\n  per_device_train_batch_size: {value}\n", encoding="utf-8")
    message = error_of(capsys, "plan", path)
    assert "mine.yaml: per_device_train_batch_size: " in message and value in message
