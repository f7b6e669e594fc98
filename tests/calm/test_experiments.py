"""Experiments: cells and their keys, whole runs that are killed and resumed, verdicts, reports."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import calm, error_of

from calm.errors import UserError
from calm.experiments.experiment import Cell, Claim, Experiment, Panel, Result
from calm.experiments.experiment_report import (
    claim_rows,
    results_table,
    write_index,
    write_report,
)
from calm.experiments.measures import MEASURES, Texts, cost_of, language_model
from calm.experiments.runner import Record, all_cells, run_experiment, training_commands
from calm.experiments.scales import SCALES
from calm.experiments.studies import EXPERIMENTS
from calm.experiments.studies.metric import pearson, spearman
from calm.experiments.studies.scaling import best_arms, fit_scores
from calm.experiments.trained import ensure_trained
from calm.experiments.verdicts import Verdict, difference, judge, seed_spread, select

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
    flags = {"train_file": "pile/*.jsonl", "tokenizer_name": "llama"}
    scale = SCALES["paper"].with_flags(**flags)
    commands = training_commands(all_cells(EXPERIMENTS["input"], scale), Path("runs"))
    assert commands[0].startswith("calm train-ae ") and len(commands) == 4
    assert all("--train_file=pile/*.jsonl" in command for command in commands)


# Verdicts


def result(start, seed, sums, **labels):
    table = [[*row, 10.0] for row in sums]
    return Result(f"{start}{seed}", {"start": start, **labels}, seed, {}, {"held-out/brier": table})


def noisy(mean, seed, groups=40):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(groups, 1, generator=torch.Generator().manual_seed(0))
    own = 0.1 * torch.randn(groups, 4, generator=generator)
    return (10 * mean + shared + own).tolist()


@pytest.mark.parametrize(
    ("better", "verdict"),
    [(0.4, Verdict.AGREES), (0.2, Verdict.DISAGREES), (0.3, Verdict.UNTOLD)],
)
def test_verdicts(better, verdict):
    results = [result("scaled", 1, noisy(better, 1)), result("zero", 1, noisy(0.3, 2))]
    claim = SMALL.claims(TINY)[0]
    found, differences = judge(claim, results)
    assert found is verdict
    assert differences[0].value == pytest.approx(better - 0.3, abs=0.01)
    assert differences[0].interval < 0.01  # the shared part cancels


def test_seeds_that_disagree_widen_the_error():
    better = [result("a", seed, noisy(mean, seed)) for seed, mean in ((1, 0.5), (2, 0.1))]
    worse = [result("b", seed, noisy(0.2, 9)) for seed in (1, 2)]
    found = difference(better, worse, "brier1")
    assert found.seeds == 2 and found.value == pytest.approx(0.1, abs=0.01)
    assert found.sign == 1 and found.interval < 0.02  # of the text alone
    spread = seed_spread([*better, *worse], "brier1")
    assert spread == (pytest.approx(0.04, rel=0.05), 2)  # (0.08 + 0) / 2
    found = difference(better, worse, "brier1", spread=spread)
    assert found.interval == pytest.approx(4.3 * 0.2, rel=0.05) and found.sign == 0


def test_the_spread_between_seeds_counts_for_cells_of_one_seed():
    repeated = [result("c", seed, noisy(mean, seed)) for seed, mean in ((1, 0.5), (2, 0.1))]
    claim = SMALL.claims(TINY)[0]
    single = [result("scaled", 1, noisy(0.4, 1)), result("zero", 1, noisy(0.3, 2))]
    assert judge(claim, single)[0] is Verdict.AGREES
    assert judge(claim, [*single, *repeated])[0] is Verdict.UNTOLD


def test_text_of_one_document_is_no_evidence_of_many():
    """Groups that repeat their neighbours, four alike, give the interval of the quarter."""
    rows = noisy(0.4, 1)
    longer = [row for row in rows for _ in range(4)]
    ours, theirs = (
        difference([result("a", 1, one)], [result("b", 1, other)], "brier1")
        for one, other in ((longer, [[3.0] * 4] * 160), (rows, [[3.0] * 4] * 40))
    )
    assert ours.interval == pytest.approx(theirs.interval) and ours.value == theirs.value


def test_intervals_hold_the_truth():
    """Of differences that are none, 5 % are beyond their interval, with two seeds too."""
    generator = np.random.default_rng(0)

    def cell(start):
        rows = [generator.normal(0, 0.05, (40, 1)) + generator.normal(0, 0.1) for _ in range(2)]
        return [result(start, seed, np.repeat(10 * each, 4, 1).tolist())
                for seed, each in enumerate(rows)]  # fmt: skip

    wrong = 0
    for _ in range(200):
        better, worse, third = cell("a"), cell("b"), cell("c")
        spread = seed_spread([*better, *worse, *third], "brier1")
        wrong += difference(better, worse, "brier1", spread=spread).sign != 0
    assert 0.02 < wrong / 200 < 0.08


def test_lower_energy_is_better():
    def energy(start, mean):
        table = [[10 * mean, 10.0]] * 3
        return Result(start, {"start": start}, 1, {}, {"held-out/energy": table})

    found = difference([energy("a", 1.0)], [energy("b", 2.0)], "energy")
    assert found.value == 1.0 and found.sign == 1


def test_select_wants_one_cell():
    results = [result("a", 1, noisy(0.1, 1), N=2), result("a", 1, noisy(0.1, 1), N=4)]
    with pytest.raises(UserError, match="2 cells have start a"):
        select(results, {"start": "a"})
    assert select(results, {"start": "a", "N": 4})[0].labels["N"] == 4


def test_other_positions_do_not_compare():
    one, other = result("a", 1, noisy(0.1, 1)), result("b", 1, noisy(0.1, 1, groups=30))
    with pytest.raises(UserError, match="not scored at the same positions"):
        difference([one], [other], "brier1")


def test_seeds_are_averaged_in_the_table():
    results = [Result("k", {"N": 2}, seed, {"held-out/brier1": value})
               for seed, value in ((1, 0.1), (2, 0.3))]  # fmt: skip
    assert "| 2 | 20.00 [10.00, 30.00] |" in results_table(
        replace(SMALL, columns=("held-out/brier1",)), results
    )


def test_correlations():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert spearman(x, x**5) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 1.0])) == pytest.approx(-1)


def scaling_result(arm, size, budget, score, *, seed=1, parameters=1e6, tokens=1e6):
    groups = [[row[0], 0.0, 0.0, 0.0, 10.0] for row in noisy(score, ord(arm[-1]) + size)]
    values = {"held-out/brier1": score, "parameters": parameters, "training_tokens": tokens}
    labels = {"arm": arm, "size": size, "budget": budget}
    return Result(f"{arm}{size}{budget}{seed}", labels, seed, values, {"held-out/brier": groups})


def test_the_best_arm_of_a_budget():
    results = [
        scaling_result(arm, size, budget, score)
        for budget, scores in ((1e9, (0.1, 0.2, 0.4, 0.3)), (2e9, (0.5, 0.2, 0.45, 0.3)))
        for (arm, size), score in zip(
            [("K = 1", 1), ("K = 1", 2), ("K = 4", 1), ("K = 4", 2)], scores, strict=True
        )
    ]
    first, second = best_arms(results)
    assert (first["best"], first["size"], first["second"]) == ("K = 4", 1, "K = 1")
    assert first["difference"] == pytest.approx(0.2, abs=0.02) and first["share"] > 0.99
    low, high = first["interval"]
    assert 0 < low < first["difference"] < high
    assert (second["best"], second["size"]) == ("K = 1", 1)
    assert first["to_tokens"] == {}


def test_the_best_size_is_best_over_seeds_and_arms_meet_the_token_baseline():
    scores = {("K = 4", 1): (0.5, 0.1), ("K = 4", 2): (0.4, 0.4), ("token baseline", 1): (0.3, 0.3)}
    results = [
        scaling_result(arm, size, 1e9, score, seed=seed)
        for (arm, size), both in scores.items()
        for seed, score in enumerate(both)
    ]
    (row,) = best_arms(results)
    assert (row["best"], row["size"]) == ("K = 4", 2)  # not the size of the luckiest seed
    difference, (low, high) = row["to_tokens"]["K = 4"]
    assert difference == row["difference"] == pytest.approx(0.1, abs=0.02)
    assert low < 0 < high  # seeds differ by more


def test_the_fit_finds_its_own_law_and_holds_out_the_largest_budget():
    def law(parameters, tokens):
        return 0.1 + 0.02 * np.log10(parameters) + 0.03 * np.log10(tokens)

    grid = [(1e5, 1e6, 1), (1e6, 1e6, 1), (1e5, 1e7, 2), (1e6, 1e7, 2), (3e6, 1e8, 3)]
    results = [
        scaling_result("K = 4", n, budget, law(p, t) + 0.05 * (budget == 3), parameters=p, tokens=t)
        for n, (p, t, budget) in enumerate(grid)
    ]
    (row,) = fit_scores(results)
    assert row["weights"] == pytest.approx([0.1, 0.02, 0.03]) and row["cells"] == 4
    assert row["residual"] < 1e-9 and row["held_out"] == pytest.approx(0.05)


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
