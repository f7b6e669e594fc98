"""Verdicts of experiments: claims about two cells, and what studies find in all of their cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from calm.errors import UserError
from calm.experiments.experiment import Claim, Result, Verdict
from calm.experiments.experiment_report import results_table
from calm.experiments.isoflop import TOKENS, arms_of_budgets, change, fit_scores
from calm.experiments.studies import EXPERIMENTS
from calm.experiments.studies.metric import METRIC, pearson, spearman
from calm.experiments.studies.scaling import SCALING
from calm.experiments.verdicts import difference, judge, seed_spread, select

SCALED = Claim("nobody", "scaled is better", {"start": "scaled"}, {"start": "zero"})


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
    claim = SCALED
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
    claim = SCALED
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
        replace(EXPERIMENTS["loss"], columns=("held-out/brier1",)), results
    )


def test_correlations():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert spearman(x, x**5) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 1.0])) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("noise", "verdict"), [(0.0, Verdict.AGREES), (1.5, Verdict.UNTOLD), (20.0, Verdict.DISAGREES)]
)
def test_what_metric_says_of_figure_3(noise, verdict):
    """Checkpoints whose BrierLM is a line of their loss, and some around it."""
    results = [
        Result(str(step), {"model": "baseline", "step": step}, 1,
               {"held-out/bits_per_token": float(step),
                "held-out/brier_lm": 30.0 - step + noise * (-1) ** step})
        for step in range(1, 9)
    ]  # fmt: skip
    (finding,) = METRIC.findings(results)
    assert finding.verdict is verdict and "checkpoints" in finding.evidence
    assert METRIC.findings(results[:2]) == []


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
    first, second = arms_of_budgets(results)
    assert first.names == ["K = 4", "K = 1"] and first.sizes == [1, 2]
    gap = first.gap("K = 4", "K = 1")
    assert gap.value == pytest.approx(0.2, abs=0.02) and first.share > 0.99
    assert 0 < gap.low < gap.value < gap.high and gap.sign == 1
    assert first.gap("K = 1", "K = 4").sign == -1
    assert second.names[0] == "K = 1" and second.sizes[0] == 1
    gain = change(first, second, "K = 1", "K = 4")
    assert gain.value == pytest.approx(0.25, abs=0.04) and gain.sign == 1
    assert change(first, first, "K = 1", "K = 4") == (0, 0, 0)


def test_the_best_size_is_best_over_seeds_and_arms_meet_the_token_baseline():
    scores = {("K = 4", 1): (0.5, 0.1), ("K = 4", 2): (0.4, 0.4), (TOKENS, 1): (0.3, 0.3)}
    results = [
        scaling_result(arm, size, 1e9, score, seed=seed)
        for (arm, size), both in scores.items()
        for seed, score in enumerate(both)
    ]
    (arms,) = arms_of_budgets(results)
    assert (arms.names[0], arms.sizes[0]) == ("K = 4", 2)  # not the size of the luckiest seed
    gap = arms.gap("K = 4", TOKENS)
    assert gap.value == pytest.approx(0.1, abs=0.02)
    assert gap.low < 0 < gap.high and gap.sign == 0  # seeds differ by more


def test_even_stretches_choose_the_size_and_odd_ones_give_the_score():
    """Size 1 is better where sizes are chosen, size 2 where arms are compared."""
    results = []
    for size, (even, odd) in {1: (0.6, 0.1), 2: (0.5, 0.9)}.items():
        one = scaling_result("K = 4", size, 1e9, 0.0)
        groups = [[10 * (odd if row % 2 else even), 0.0, 0.0, 0.0, 10.0] for row in range(40)]
        one.groups["held-out/brier"][:] = groups
        results.append(one)
    (arms,) = arms_of_budgets(results)
    assert arms.sizes == [1] and arms.scores == pytest.approx([0.1])


def test_what_scaling_says_of_figure_4():
    scores = {"K = 1": (0.1, 0.1), "K = 4": (0.2, 0.4), TOKENS: (0.3, 0.3)}
    results = [
        scaling_result(arm, 1, budget, score)
        for arm, of_budgets in scores.items()
        for budget, score in zip((1e9, 2e9), of_budgets, strict=True)
    ]
    verdicts = {finding.text: finding.verdict for finding in SCALING.findings(results)}
    assert [text for text in verdicts if "K = 2" in text] == []
    assert list(verdicts.values()) == [
        Verdict.AGREES, Verdict.AGREES, Verdict.AGREES, Verdict.DISAGREES
    ]  # fmt: skip
    assert SCALING.findings(results[:1]) == []
    assert "K = 4 | 1 |" in SCALING.analysis(results)


def test_how_often_the_best_size_is_at_the_edge_of_its_grid():
    best = {
        1e9: {"K = 1": 1, "K = 4": 2},
        2e9: {"K = 1": 3, "K = 4": 1},
        3e9: {"K = 1": 3, "K = 4": 3},
    }
    grid = {1e9: (1, 2, 3), 2e9: (1, 3), 3e9: (3,)}
    results = [
        scaling_result(arm, size, budget, 0.5 if size == chosen else 0.1)
        for budget, arms in best.items()
        for arm, chosen in arms.items()
        for size in grid[budget]
    ]
    analysis = SCALING.analysis(results)
    assert "is the smallest of its budget in 2 of 4 cases, the largest in 1: the" in analysis
    assert "One size for each budget" in SCALING.analysis(results[-2:])


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
