"""The card that training writes beside the weights."""

import json

import pytest
from huggingface_hub import ModelCard
from training_cases import MAIN, flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a CALM, trained and evaluated, beside its autoencoder."""
    root = tmp_path_factory.mktemp("cards")
    assert MAIN["autoencoder"](flags(root, "autoencoder")) == 0
    assert train(root, "--do_train", "--do_eval") == 0
    return root / "calm"


def train(root, *extra):
    ae = f"--ae_name_or_path={root / 'autoencoder'}"
    return MAIN["calm"](flags(root, "calm", ae, *extra))


def test_what_the_hub_reads(folder):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("calm-lm", "text-generation")
    (score,) = card.data.eval_results
    found = json.loads((folder / "eval_results.json").read_text())["eval_brier_lm"]
    assert score.metric_value == pytest.approx(found, abs=1e-3)
    assert "| trained on | text.jsonl: " in card.text and "4 steps of " in card.text
    autoencoder = ModelCard.load(folder.parent / "autoencoder" / "README.md")
    assert autoencoder.data.pipeline_tag is None and "BrierLM" not in autoencoder.text


def test_its_example_runs(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(ModelCard.load("calm/README.md").text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("Returns the ")


def test_the_card_of_a_person_stays(folder):
    path = folder / "README.md"
    path.write_text("mine", encoding="utf-8")
    assert train(folder.parent, "--do_train", "--overwrite_output_dir") == 0
    assert path.read_text(encoding="utf-8") == "mine"
