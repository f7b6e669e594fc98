"""Models that come with the package: how they are made, found, listed and taken by default.

The real ones are tested only where they are there; all else runs on tiny ones, made by the same
commands.
"""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import calm, error_of, has_weights, objects
from huggingface_hub import ModelCard
from safetensors import safe_open
from training_cases import MAIN, SIZES, flags, write_corpus

import calm as calm_package
from calm import Autoencoder, BaselineTransformer, EnergyTransformer, cli, pretrained
from calm.errors import UserError
from calm.training.flags.arguments import ModelArguments

MEGABYTES = 4_000_000
READOUT = "token_loss_weight=0.3,token_readout=causal,keep_token_readout=true,beta=0.5"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A CALM with a readout and a baseline, trained for 4 steps and exported under the names."""
    root = tmp_path_factory.mktemp("made")
    text = write_corpus(root)
    ae = f"--ae_name_or_path={root / 'autoencoder'}"
    sizes = f"--config_overrides={SIZES['calm']},{READOUT},max_position_embeddings=8"
    assert MAIN["autoencoder"](flags(root, "autoencoder", "--do_train", text=text)) == 0
    assert MAIN["calm"](flags(root, "calm", ae, sizes, "--do_train", text=text)) == 0
    assert MAIN["baseline"](flags(root, "baseline", "--do_train", text=text)) == 0
    for run, name in zip(("calm", "baseline"), pretrained.PRETRAINED, strict=True):
        assert export(root / run, root / "package" / name, "--license", "mit") == 0
    return root


def export(run, folder, *more):
    text = ("--data", run.parent / "text.jsonl", "--validation-split-percentage", 20)
    return calm("export", "--model", run, "--output", folder, *text, "--block-size", 32, *more)


@pytest.fixture
def installed(made, monkeypatch):
    """The tiny models as those of the package."""
    monkeypatch.setattr(pretrained, "FOLDER", made / "package")
    return made / "package"


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)


class TestExport:
    def test_weights_are_halved_and_computed_as_before(self, made):
        folder = made / "package" / pretrained.DEFAULT
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert {weight.dtype for weight in stored.values()} == {torch.float16}
        before = EnergyTransformer.from_pretrained(made / "calm").state_dict()
        after = EnergyTransformer.from_pretrained(folder).state_dict()
        assert after.keys() == before.keys() == stored.keys()
        for name, weight in before.items():
            assert torch.equal(after[name], weight.half().float()), name

    def test_the_card_has_the_scores_of_calm_eval(self, made, tmp_path, monkeypatch):
        folder = made / "package" / pretrained.DEFAULT
        card = ModelCard.load(folder / "README.md")
        monkeypatch.chdir(made / "package")
        for method in ("direct", "readout"):
            out = tmp_path / f"{method}.json"
            text = ("--data", made / "text.jsonl", "--validation-split-percentage", 20)
            words = ("--model", pretrained.DEFAULT, *text, "--block-size", 32, "--json", out)
            assert calm("eval", *words, "--method", method) == 0
            record = json.loads(out.read_text())
            assert record == json.loads((folder / f"evaluation-{method}.json").read_text())
            low, high = record["brier_lm_interval"]
            row = f"| {record['brier_lm']:.2f} | {low:.2f} to {high:.2f} | "
            assert row in card.text
        assert card.data.license == "mit" and card.data.eval_results
        assert "Its licence has not been recorded" in card.text
        assert "stored in float16, loaded as float32" in card.text
        assert "| context | 32 tokens |" in card.text
        command = "calm eval --model calm-docstrings --data text.jsonl "
        assert f"`{command}--validation-split-percentage 20 --block-size 32` and" in card.text

    def test_nothing_names_a_folder_of_this_machine(self, made):
        named = f'"data": "{made / "text.jsonl"}"'  # by the user
        for path in (made / "package").rglob("*.*"):
            if path.suffix in (".json", ".md"):
                assert str(made) not in path.read_text(encoding="utf-8").replace(named, ""), path

    def test_the_example_of_the_card_runs(self, installed, capsys):
        for name in pretrained.PRETRAINED:
            card = ModelCard.load(installed / name / "README.md").text
            exec(card.split("```python\n")[1].split("```")[0].replace("64", "8"), {})
            assert capsys.readouterr().out.startswith("Returns the ")

    def test_files_are_known_to_be_whole(self, made, tmp_path, capsys):
        assert calm("verify", made / "package") == 0
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in (made / "package" / pretrained.DEFAULT).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        weights = bytearray((copy / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "model.safetensors").write_bytes(weights)
        capsys.readouterr()
        assert "are not those that were written" in error_of(capsys, "generate", "--model", copy)

    def test_what_is_there_is_kept(self, made, tmp_path, capsys):
        words = ("export", "--model", made / "calm", "--output")
        assert "is not empty" in error_of(capsys, *words, made)
        (tmp_path / "mine.txt").write_text("mine")
        text = ("--data", made / "text.jsonl")
        message = error_of(capsys, *words, tmp_path, "--overwrite", *text)
        assert "no export has written mine.txt" in message
        again = made / "again"
        assert export(made / "baseline", again, "--max-blocks", 1) == 0
        assert export(made / "baseline", again, "--max-blocks", 1, "--overwrite") == 0
        assert "one block only" in (again / "README.md").read_text()

    def test_an_export_that_fails_leaves_the_one_before(self, made, tmp_path, capsys, monkeypatch):
        folder = tmp_path / "kept"
        assert export(made / "baseline", folder, "--max-blocks", 1) == 0
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        capsys.readouterr()

        def fail(*_):
            raise UserError("no text to score")

        monkeypatch.setattr("calm.commands.evaluate.score", fail)
        assert export(made / "baseline", folder, "--max-blocks", 1, "--overwrite") == 2
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_whole_folder_of_another_kind_is_kept(self, made, capsys):
        words = ("export", "--model", made / "calm", "--data", made / "text.jsonl", "--overwrite")
        before = sorted((made / "baseline").iterdir())
        message = error_of(capsys, *words, "--output", made / "baseline")
        assert "no export has written" in message
        assert sorted((made / "baseline").iterdir()) == before

    def test_text_that_was_not_held_out_is_not_called_so(self, made, tmp_path):
        text = ("--data", made / "text.jsonl", "--validation-split-percentage", 0)
        words = ("--model", made / "baseline", "--output", tmp_path / "all", "--max-blocks", 2)
        assert calm("export", *words, *text, "--block-size", 32) == 0
        card = ModelCard.load(tmp_path / "all" / "README.md")
        (result,) = card.data.eval_results
        assert result.dataset_name == "text.jsonl" and "held-out" not in card.content
        assert "tokens of the text.jsonl, 2 blocks" in card.text

    def test_a_model_without_records_is_refused(self, folders, tmp_path, capsys):
        words = ("--model", folders / "calm", "--output", tmp_path / "out")
        message = error_of(capsys, "export", *words, "--data", folders / "text.txt")
        assert "lacks protocol.json or trainer_state.json" in message


class TestNames:
    def test_classes_know_them(self, installed):
        model = EnergyTransformer.from_pretrained("calm-docstrings")
        assert model.config.beta == 0.5 and model.token_readout is not None
        assert model.dtype == torch.float32
        folder = calm_package.pretrained_path("calm-docstrings-baseline")
        assert folder == installed / "calm-docstrings-baseline"
        found = BaselineTransformer.from_pretrained("calm-docstrings-baseline")
        expected = BaselineTransformer.from_pretrained(folder)
        assert torch.equal(found.lm_head.weight, expected.lm_head.weight)

    def test_the_baseline_of_gap_may_be_one(self, installed):
        words = [
            "experiment",
            "gap",
            "--model",
            "runs/calm",
            "--baseline",
            "calm-docstrings-baseline",
        ]
        args = cli._parser("experiment").parse_args(words)
        assert args.baseline == str(installed / "calm-docstrings-baseline")

    def test_tables_show_the_name(self, installed, capsys):
        assert calm("plan", "calm-docstrings-baseline") == 0
        assert capsys.readouterr().out.startswith("calm-docstrings-baseline (baseline)\n")
        message = error_of(capsys, "compare", "calm-docstrings")
        assert message.endswith("two different folders, got calm-docstrings")
        elsewhere = str(installed / "runs" / "calm-docstrings")
        assert pretrained.shown_name(elsewhere) == elsewhere

    def test_training_knows_them(self, installed):
        given = ModelArguments(
            model_name_or_path="calm-docstrings", teacher_name_or_path="calm-docstrings-baseline"
        )
        assert given.model_name_or_path == str(installed / "calm-docstrings")
        assert given.teacher_name_or_path == str(installed / "calm-docstrings-baseline")

    def test_a_class_of_another_kind_is_refused(self, installed):
        for class_, name, kind in (
            (EnergyTransformer, "calm-docstrings-baseline", "baseline"),
            (BaselineTransformer, "calm-docstrings", "energy"),
            (Autoencoder, "calm-docstrings", "energy"),
        ):
            message = f"holds a model of kind '{kind}', which {class_.__name__} does not load"
            with pytest.raises(UserError, match=message):
                class_.from_pretrained(name)

    def test_a_folder_of_that_name_comes_first(self, installed, made, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        os.symlink(made / "calm", "calm-docstrings")
        assert pretrained.packaged("calm-docstrings") == "calm-docstrings"
        assert pretrained.packaged(Path("calm-docstrings-baseline")) != "calm-docstrings-baseline"
        assert pretrained.packaged("another") == "another"

    def test_an_unknown_name_and_missing_weights_are_told(self, nothing_installed, capsys):
        with pytest.raises(UserError, match=r"name must be one of .*, got 'nope'"):
            calm_package.pretrained_path("nope")
        with pytest.raises(UserError, match=r"should come with the package.*make pretrained"):
            EnergyTransformer.from_pretrained("calm-docstrings")
        for words in (
            ("generate", "--prompt", "a"),
            ("eval",),
            ("eval", "--model", "calm-docstrings"),
            ("serve", "--port", 0),
            ("pretrained",),
        ):
            assert "calm-docstrings should come with the package" in error_of(capsys, *words)


class TestCommands:
    def test_the_example_takes_it_and_says_so(self, package, capsys, monkeypatch):
        example = Path(__file__).resolve().parents[2] / "examples" / "continue_text.py"
        monkeypatch.setattr(sys, "argv", [str(example)])
        runpy.run_path(str(example), run_name="__main__")
        captured = capsys.readouterr()
        assert captured.err.startswith("model: calm-docstrings, which comes with the package\n")
        shown = re.findall(r"^(.*), \d+ tokens/s: Returns the ", captured.out, re.MULTILINE)
        assert shown == ["batch, T = 1", "batch, T = 0.5", "readout, T = 1", "readout, T = 0.5"]

    def test_generate_takes_it_and_says_so(self, installed, capsys):
        words = ("--prompt", "the cat ", "--max-new-tokens", 8, "--num-samples", 8, "--json")
        assert calm("generate", *words) == 0
        captured = capsys.readouterr()
        assert captured.err == (
            "model: calm-docstrings, which comes with the package (--model takes another)\n"
        )
        assert calm("generate", "--model", "calm-docstrings", *words) == 0
        named = capsys.readouterr()
        assert named.err == ""
        texts = [json.loads(out)["text"] for out in (captured.out, named.out)]
        assert texts[0] == texts[1] and texts[0]

    def test_the_list(self, installed, capsys):
        assert calm("pretrained") == 0
        shown = capsys.readouterr().out
        assert calm("pretrained", "--json") == 0
        models = json.loads(capsys.readouterr().out)
        assert [model["name"] for model in models] == list(pretrained.PRETRAINED)
        model = EnergyTransformer.from_pretrained("calm-docstrings")
        total = sum(weight.numel() for weight in model.parameters())
        assert models[0]["parameters"] + models[0]["autoencoder_parameters"] == total
        for model in models:
            assert model["path"] in shown and f"{model['brier_lm']['direct']['value']:.2f}" in shown


@pytest.mark.skipif(not has_weights(), reason="this checkout has no weights: make pretrained")
class TestTheRealOnes:
    def test_they_are_small_and_whole(self, capsys):
        files = pretrained.FOLDER.glob("calm-*/*")
        assert sum(path.stat().st_size for path in files) <= MEGABYTES
        assert calm("verify", pretrained.FOLDER) == 0

    def test_they_write_words(self, capsys):
        words = ("--prompt", "Returns the ", "--max-new-tokens", 64, "--method", "readout")
        assert calm("generate", *words, "--json") == 0
        (record,) = objects(capsys)
        known = {"the", "of", "a", "is", "to", "in", "and", "for", "if", "or", "object", "string"}
        assert known & set(record["text"].split()), record["text"]
