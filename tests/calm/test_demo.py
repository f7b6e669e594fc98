"""The demo from its command line to its files, with a model that learns nothing in seconds."""

import json
import math

import pytest
from PIL import Image

from calm.cli import main
from calm.evaluation.diagnostics import advice
from calm.experiments.demo_gap import DemoGap
from calm.experiments.demo_report import _gap

FILES = ("report.md", "results.json", "curves.png")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Paragraphs that end differently, broken into lines."""
    path = tmp_path_factory.mktemp("text") / "river.txt"
    paragraphs = [
        f"The river ran past mill number {number}\nand the miller counted {number * 7} sacks,\n"
        f"one of which he kept for the {number}th of the month."
        for number in range(300)
    ]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """The folder of a finished demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(
        "extends: tiny\ncalm:\n  config_overrides:\n    token_loss_weight: 1\n"
        "    token_readout: causal\n    keep_token_readout: true\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        status = main(
            ["demo", "--text", str(text_file), "--recipe", str(recipe), "--minutes", "0.06",
             "--output-dir", str(folder), "--seed", "3"]
        )  # fmt: skip
    assert status == 0
    return folder


def test_files(finished):
    for name in FILES:
        assert (finished / name).stat().st_size > 0
    with Image.open(finished / "curves.png") as image:
        assert image.width > 1000


def test_figures_are_finite_and_belong_together(finished):
    results = json.loads((finished / "results.json").read_text())
    assert 0 < results["accuracy"] <= 1
    assert results["peak_memory_bytes"] > 2**20
    for name in ("calm", "readout", "baseline"):
        model = results[name]
        brier = model["evaluation"]["brier"]
        assert all(math.isfinite(value) and -1 <= value <= 1 for value in brier.values())
        assert model["evaluation"]["protocol"]["skip_repeats"] is True
        drawn = model["evaluation"]["protocol"]["method"]
        assert drawn == ("readout" if name == "readout" else "direct")
        assert model["run"]["steps"] > 0
        assert model["run"]["scores"][-1]["train_seconds"] <= model["run"]["seconds"]
        assert {sample["temperature"] for sample in model["samples"]} == {1.0, 1 / 3}
    # Both language models had the same time, but for the step in which it ended.
    seconds = [results[name]["run"]["seconds"] for name in ("calm", "baseline")]
    assert max(seconds) < 2 * min(seconds)
    # Both were scored on the same held-out documents, with start chunks before them or without.
    layouts = [
        results[name]["evaluation"]["protocol"]["start_chunks"] for name in ("calm", "baseline")
    ]
    assert layouts == [True, False]
    hashes = {
        results[name]["evaluation"]["protocol"]["data_sha256"] for name in ("calm", "baseline")
    }
    assert len(hashes) == 1


def test_the_report_says_where_brier_lm_is_lost(finished):
    gap = json.loads((finished / "results.json").read_text())["gap"]
    page = (finished / "report.md").read_text()
    assert gap["note"] == "" and "## Where BrierLM is lost" in page
    for name in ("trunk", "head", "dispersion"):
        value, low, high = gap[name]
        assert low <= value <= high and f"- {name}: " in page


def test_the_report_tells_the_models_health_and_what_to_do(finished):
    """A model of seconds has learned too little to be sound."""
    health = json.loads((finished / "results.json").read_text())["health"]
    page = (finished / "report.md").read_text()
    assert health["table"] in page and health["values"]["reconstruction"] < 0.99
    assert any(line.startswith("reconstruction is 0.") for line in health["advice"])
    assert health["advice"] == advice(health["values"])
    assert all(f"- {line}\n" in page for line in health["advice"])


@pytest.mark.parametrize(
    ("head", "is_enough"), [((0.5, 0.1, 0.9), True), ((0.5, -0.1, 0.9), False)]
)
def test_losses_are_bounds_that_a_short_training_of_the_readout_leaves_wide(head, is_enough):
    trunk, shown, *more = _gap(DemoGap((2.0, 1.0, 3.0), head))
    assert trunk.startswith("trunk: ") and trunk.endswith(": at most 2.00 [1.00, 3.00]")
    assert shown.startswith("head: ") and ": at least 0.50" in shown
    assert [line.startswith("the readout has not learned enough") for line in more] == (
        [] if is_enough else [True]
    )


def test_samples_continue_the_same_held_out_documents(finished, text_file):
    results = json.loads((finished / "results.json").read_text())
    paragraphs = text_file.read_text().split("\n\n")
    prompts = [
        [sample["prompt"] for sample in results[name]["samples"]] for name in ("calm", "baseline")
    ]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 6
    for prompt in prompts[0]:
        assert any(paragraph.startswith(prompt) for paragraph in paragraphs)


def test_report_shows_what_was_measured(finished):
    results = json.loads((finished / "results.json").read_text())
    report = (finished / "report.md").read_text()
    assert "CALM, readout |" in report and "CALM, readout, T = 1/3:" in report
    for name in ("calm", "readout", "baseline"):
        assert f"{100 * results[name]['evaluation']['brier']['brier1']:.2f}" in report
    assert f"{100 * results['accuracy']:.3f} %" in report
    assert "river.txt" in report


@pytest.mark.parametrize("model", ["calm", "baseline"])
def test_checkpoints_generate(finished, model, capsys):
    folder = finished / model
    assert main(["generate", "--model", str(folder), "--prompt", "The rive", "--temperature", "1",
                 "--max-new-tokens", "8"]) == 0  # fmt: skip
    assert capsys.readouterr().out.startswith("The rive")


def test_evaluation_command_of_the_report_repeats_its_score(finished, text_file, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    command = next(line for line in results["commands"] if line.startswith("calm eval"))
    record = tmp_path / "again.json"
    assert main([*command.split()[1:], "--json", str(record)]) == 0
    again = json.loads(record.read_text())
    first = results["calm"]["evaluation"]
    assert again["protocol"]["data_sha256"] == first["protocol"]["data_sha256"]
    for order, value in first["brier"].items():
        assert again["brier"][order] == pytest.approx(value, abs=1e-6)


def test_no_time_is_an_error(capsys):
    assert main(["demo", "--minutes", "0"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err
