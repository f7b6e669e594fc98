"""Experiments: cells and their keys, whole runs that are killed and resumed, verdicts, reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import calm, error_of

from calm.errors import UserError
from calm.experiments.experiment import Cell, Claim, Experiment, Panel, Result, Verdict
from calm.experiments.experiment_report import (
    claim_rows,
    write_index,
    write_report,
)
from calm.experiments.measures import MEASURES, Texts, cost_of, language_model
from calm.experiments.runner import Record, all_cells, run_experiment, training_commands
from calm.experiments.scales import SCALES
from calm.experiments.studies import EXPERIMENTS
from calm.experiments.trained import ensure_trained
from calm.experiments.verdicts import select

TINY = SCALES["tiny"]


def two_cells(scale, seed):
    starts = ("zero", "scaled")
    return [
        Cell({"start": start}, scale.calm(seed, config_overrides={"head_init": start}), seed=seed)
        for start in starts
    ]


SMALL = Experiment(
    name="small", question="Does it run?", cells=two_cells, columns=("held-out/brier1", "seconds"),
    panels=lambda scale: [Panel("Loss", "step", "loss", line="start", is_curve=True),
                          Panel("Brier-1", "start", "held-out/brier1")],
    claims=lambda scale: [Claim("nobody", "scaled is better", {"start": "scaled"},
                                {"start": "zero"})],
)  # fmt: skip


class Killed(BaseException):
    """What a signal would do."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Root and record of a run that was killed after its first cell, and resumed."""
    root = tmp_path_factory.mktemp("experiments")
    texts = Texts(TINY.autoencoder().flags)

    def until_the_second(cells):
        yield cells[0]
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with pytest.raises(Killed):
            run_experiment(SMALL, TINY, texts, root, progress=until_the_second)
        first = Record.read(root / "small" / "results.json")
        record = run_experiment(SMALL, TINY, texts, root)
    return root, first, record


def test_a_killed_run_loses_one_cell_at_most(finished):
    root, first, record = finished
    assert len(first.results) == 1 and len(record.results) == 2
    assert record.results[0] == first.results[0]  # measured once
    assert Record.read(root / "small" / "results.json") == record
    assert len(list((root / "models").iterdir())) == 3  # one autoencoder for both


def test_results_are_finite_and_hold_what_comparisons_need(finished):
    for result in finished[2].results:
        numbers = [value for value in result.values.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        assert result.values["training_flops"] > 1e8
        assert result.values["held-out/energy"] > result.values["held-out/floor"] > 0
        sums = torch.tensor(result.groups["held-out/brier"])
        means = sums[:, :4].sum(0) / sums[:, 4].sum()
        assert means[0].item() == pytest.approx(result.values["held-out/brier1"], abs=1e-5)
        assert result.curve[-1]["step"] > 5


def test_the_cost_of_a_checkpoint_and_the_places_of_ngrams(finished, monkeypatch, tmp_path):
    root, _, record = finished
    trained = ensure_trained(two_cells(TINY, 1)[0].training, root / "models")
    whole, half = cost_of(trained), cost_of(trained, checkpoint=6)  # of 12 steps
    assert 2 * half["training_tokens"] == whole["training_tokens"]
    assert 2 * half["training_flops"] == whole["training_flops"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    measured = language_model(trained, Texts(TINY.autoencoder().flags), TINY, multiples_of=8)
    counts = [sum(row[-1] for row in each.groups["held-out/brier"])
              for each in (measured, record.results[0])]  # fmt: skip
    assert 0.3 < counts[0] / counts[1] < 0.7  # every other chunk of 4 tokens


def test_draws_of_a_readout_are_measured_as_its_own(finished, monkeypatch, tmp_path):
    root = finished[0]
    kept = {"token_loss_weight": 1, "token_readout": "causal", "keep_token_readout": True}
    trained = ensure_trained(TINY.calm(config_overrides=kept), root / "models")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = Texts(TINY.autoencoder().flags)
    own = language_model(trained, texts, TINY, method="readout").values
    head = language_model(trained, texts, TINY).values
    assert own["inference_flops"] == trained.flops(trained.load()).inference_by_readout()
    assert "inference_flops" not in head and "held-out/energy" not in own
    # Bits of 259 tokens; a readout that starts at equal chances has learned a little.
    assert 3 < own["held-out/bits_per_token"] < np.log2(259)
    assert own["held-out/brier1"] != head["held-out/brier1"]


def test_one_cell_gives_the_same_bits_again(finished, tmp_path, monkeypatch):
    _, first, _ = finished
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    only = replace(SMALL, cells=lambda scale, seed: two_cells(scale, seed)[:1])
    again = run_experiment(only, TINY, Texts(TINY.autoencoder().flags), tmp_path).results[0]
    ours, theirs = ({**result.values, "seconds": 0} for result in (again, first.results[0]))
    assert ours == theirs and again.groups == first.results[0].groups


def test_the_report_says_what_was_run(finished, tmp_path):
    _, _, record = finished
    page = write_report(SMALL, TINY, record, tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "2 models measured" in page and "embedded:topics" in page and "| zero |" in page
    assert TINY.caution in page and "Of 1 claim, " in page and "seeds 1;" in page
    assert "training tokens 3072; training FLOPs 3.43e+08" in page
    assert any(f"| nobody | scaled is better | {verdict} |" in page for verdict in Verdict)


def test_results_of_another_grid_are_not_shown(finished, tmp_path):
    _, _, record = finished
    stale = replace(record.results[0], key="of an older recipe")
    mixed = replace(record, results=[stale, *record.results[::-1]])
    assert mixed.current(SMALL, TINY) == record.results  # in the grid's order
    page = write_report(SMALL, TINY, mixed, tmp_path)
    assert "2 models measured" in page and "1 results of cells that this grid" in page


def test_a_claim_that_cannot_be_judged_spoils_no_other(finished):
    first, second = finished[2].results
    short = replace(second, groups={name: rows[:1] for name, rows in second.groups.items()})
    (row,) = claim_rows(SMALL, TINY, [first, short])
    assert row[2] is Verdict.UNTOLD and "same positions" in row[3]


def test_an_index_outlives_a_grid_that_has_changed(tmp_path):
    """Findings of no result are none; other experiments are still listed."""
    folder = tmp_path / "scaling"
    folder.mkdir()
    labels = {"arm": "K = 4", "size": "small", "budget": 1.0}
    Record("scaling", {}, {}, [Result("of an old grid", labels, 1, {})]).write(
        folder / "results.json"
    )
    write_index([EXPERIMENTS["scaling"]], TINY, tmp_path)
    assert "scaling/report.md" in (tmp_path / "README.md").read_text()


def test_the_index_has_every_claim(finished):
    root, _, _ = finished
    write_index([SMALL, replace(SMALL, name="never run")], TINY, root)
    page = (root / "README.md").read_text(encoding="utf-8")
    assert "[small](small/report.md): Does it run?" in page and "never run" not in page
    assert page.count("| small | nobody | scaled is better |") == 1


def test_results_of_another_configuration_are_refused(finished):
    root, _, _ = finished
    texts = Texts(TINY.autoencoder().flags)
    with pytest.raises(UserError, match="another configuration: draws was 4, now 8"):
        run_experiment(SMALL, replace(TINY, draws=8), texts, root)
    with pytest.raises(UserError, match="another configuration: texts"):
        run_experiment(SMALL, TINY, Texts(TINY.autoencoder().flags, "other.jsonl"), root)


def test_results_of_other_packages_are_refused(finished, monkeypatch):
    """Embedded text is read from what is installed, and another version has another text."""
    root, _, _ = finished
    monkeypatch.setattr("calm.experiments.measures.embedded_stamp", lambda name: "other")
    with pytest.raises(UserError, match=r"another configuration: stamps was .* now .*'other'"):
        run_experiment(SMALL, TINY, Texts(TINY.autoencoder().flags), root)


def test_damaged_results_are_an_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"experiment": "small"', encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        Record.read(path)
    Record("small", {}, {}, [Result("key", {}, 7, {})]).write(path)
    assert Record.read(path).results[0].seed == 7
    path.write_text(path.read_text("utf-8").replace("7", '"7"'), encoding="utf-8")
    with pytest.raises(UserError, match="a seed is no whole number"):
        Record.read(path)


# Keys


def test_keys_follow_what_decides_the_weights():
    reference = TINY.calm(1)
    assert reference.key == TINY.calm(1).key
    assert reference.but(config_overrides={"beta": 0.5}).key != reference.key
    assert reference.but(a=1).but(b=2).key == reference.but(b=2).but(a=1).key
    assert TINY.calm(2).key != reference.key
    other = TINY.autoencoder(config_overrides={"latent_size": 8})
    assert TINY.calm(1, other).key != reference.key
    assert TINY.calm(2).autoencoder.key == reference.autoencoder.key  # shared by all seeds
    merged = reference.but(config_overrides={"beta": 0.5}).flags["config_overrides"]
    assert merged["beta"] == "0.5" and merged["hidden_size"] == "32"


def test_a_teacher_is_trained_first():
    """It decides the weights of the autoencoder, and of what learns on that."""
    other = TINY.autoencoder(1, TINY.baseline(), config_overrides={"alignment_weight": 0.5})
    plain = TINY.autoencoder(1, config_overrides={"alignment_weight": 0.5})
    assert other.key != plain.key == plain.but().key and other.but(a=1).teacher is other.teacher
    calm = TINY.calm(1, other)
    assert [training.stage.value for training in calm.needed] == ["baseline", "autoencoder"]
    cells = [Cell({"n": 1}, TINY.baseline(2)), Cell({"n": 2}, calm)]
    commands = [command.split() for command in training_commands(cells, Path("runs"))]
    assert [words[1] for words in commands] == ["train-ar", "train-ae", "train-ar", "train"]
    assert f"--teacher_name_or_path=runs/models/{TINY.baseline().key}" in commands[1]
    assert "--seed=1" in commands[0] and "--seed=2" in commands[2]


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=list(EXPERIMENTS))
def test_every_grid_is_sound(experiment, scale):
    cells = all_cells(experiment, replace(scale, seeds=(1,)))
    assert len({cell.key for cell in cells}) == len(cells) > 1
    assert all(cell.measure in MEASURES for cell in cells)
    trainings = {cell.key: cell.training for cell in cells}
    labels = [Result(cell.key, dict(cell.labels), cell.seed, {}) for cell in cells]
    for claim in experiment.claims(scale):
        pair = select(labels, claim.better)[0], select(labels, claim.worse)[0]
        if "energy" in claim.metrics:  # its unit is that of the latents
            before = {trainings[result.key].autoencoder.key for result in pair}
            assert len(before) == 1, claim.text
    for panel in experiment.panels(scale):
        shown = [result for result in labels if panel.shows(result)]
        assert shown, panel.title
        if panel.line is None and panel.x in shown[0].labels:
            places = [result.labels[panel.x] for result in shown]
            assert len(places) == len(set(places)), panel.title  # no mean over different cells
    for training in {each.key: each for each in trainings.values()}.values():
        assert training.flops_per_step() > 0  # its flags make a model


def test_commands_for_a_cluster():
    flags = {"train_file": "runs/pile", "tokenizer_name": "runs/pile"}
    scale = SCALES["paper"].with_flags(**flags)
    commands = training_commands(all_cells(EXPERIMENTS["input"], scale), Path("runs"))
    assert commands[0].startswith("calm train-ae ") and len(commands) == 4
    assert all("--train_file=runs/pile" in command for command in commands)


# The command


def test_mistakes(capsys):
    assert "invalid choice: 'nothing'" in error_of(capsys, "experiment", "nothing")
    assert "invalid choice: 'huge'" in error_of(capsys, "experiment", "loss", "--scale", "huge")
    words = ("experiment", "loss", "--scale", "paper")
    assert "needs --train-file and --tokenizer" in error_of(capsys, *words)


def test_list_trains_nothing(tmp_path, capsys):
    assert calm("experiment", "loss", "--list", "--output-dir", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert calm("experiment", "loss", "--list", "--seeds", 5, 6) == 0
    both = capsys.readouterr().out
    assert both.count("--seed=5") == both.count("--seed=6") == 6
    assert len(lines) == 7 and not (tmp_path / "out").exists()
