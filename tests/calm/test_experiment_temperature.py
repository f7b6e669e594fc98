"""The temperature study: its statistics on known distributions, and a whole run."""

import json
import math

import pytest
import torch
from cli_cases import calm, error_of
from tiny_models import tiny_calm

from calm.errors import UserError
from calm.experiments.temperature import run_study, settings_of, to_markdown
from calm.experiments.temperature_measures import (
    Outcomes,
    Positions,
    Setting,
    StudyOptions,
    difference,
    draw_outcomes,
    geometric_mean,
    interval,
    squared_distance,
    take_positions,
)

KNOWN, OTHER = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
POSITIONS, REPEATS = 4000, 5


def outcomes(distribution, seed, *, repeats=REPEATS):
    """Chunks x, x + 1, x + 2, x + 3 with x drawn from `distribution` at every position."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(
        distribution.expand(POSITIONS, -1), repeats, replacement=True, generator=generator
    ).T  # [R, P]
    tokens = first[..., None] + torch.arange(4)
    nothing = torch.zeros(first.shape, dtype=torch.int64)
    return Outcomes(tokens, nothing + 1, nothing.bool())


def everywhere():
    return torch.ones(POSITIONS, dtype=torch.bool)


def test_accuracy_and_collision_of_a_known_distribution():
    drawn = outcomes(KNOWN, 1)
    target = torch.arange(4).expand(POSITIONS, -1)  # the first of the three chunks
    # Equal in the first token is equal in all: one share for every n.
    torch.testing.assert_close(
        drawn.matches(target).mean(0), torch.full((4,), 0.6), atol=0.015, rtol=0
    )
    torch.testing.assert_close(
        drawn.collisions().mean(0), torch.full((4,), 0.46), atol=0.015, rtol=0
    )


@pytest.mark.parametrize(
    ("other", "expected"), [(KNOWN, 0.0), (OTHER, 0.4**2 + 0.4**2)], ids=["same", "other"]
)
def test_distance_of_known_distributions(other, expected):
    distance, error = squared_distance(outcomes(KNOWN, 1), outcomes(other, 2), everywhere())
    assert 0 < error < 0.02
    assert abs(distance - expected) < 4 * error


def test_distance_skips_positions_that_do_not_count():
    counts = everywhere()
    counts[1:] = False
    first = outcomes(KNOWN, 1)
    distance, _ = squared_distance(first, first, counts)
    same = (first.tokens[:, None, 0] == first.tokens[:, 0]).all(-1).double()  # [R, R]
    within = (same.sum() - REPEATS) / (REPEATS * (REPEATS - 1))
    assert distance == pytest.approx(float(2 * within - 2 * same.mean()))
    assert math.isnan(squared_distance(first, first, ~everywhere())[0])


def test_the_interval_holds_the_value_and_shrinks():
    shares = torch.rand(400, 4, generator=torch.Generator().manual_seed(0))
    value = float(geometric_mean(shares.mean(0)))
    low, high = interval(shares)
    assert low < value < high
    few_low, few_high = interval(shares[:25])
    assert 2.5 < (few_high - few_low) / (high - low) < 6  # about sqrt(16)
    assert geometric_mean(torch.tensor([0.5, 0.0])) == 0


def blocks():
    """Two blocks of 12 chunks; the second has padding, begin tokens and a run."""
    ids = torch.randint(5, (2, 48), generator=torch.Generator().manual_seed(0))
    ids[1, 24:28] = 3
    labels = ids.clone()
    labels[1, 40:] = -100
    labels[1, 20:24] = -100
    return [{"input_ids": i.numpy(), "labels": t.numpy()} for i, t in zip(ids, labels, strict=True)]


def test_positions_are_true_chunks_after_their_states():
    model = tiny_calm()
    positions = take_positions(model, blocks(), 1000, seed=0)
    assert len(positions) == 8 + 4  # 4 chunks of context; not padding, begin tokens, run
    hidden = model(torch.as_tensor(blocks()[0]["input_ids"])[None]).last_hidden_state[0]
    for state, chunk in zip(positions.hidden, positions.chunks, strict=True):
        distance = (hidden - state).abs().amax(-1)
        if distance.min() < 1e-5:
            at = int(distance.argmin()) + 1
            expected = blocks()[0]["input_ids"][4 * at : 4 * at + 4].tolist()
            assert chunk.tolist() == expected and at >= 4
    assert len(take_positions(model, blocks(), 3, seed=0)) == 3
    with pytest.raises(UserError, match="holds no chunk with 4 others before it"):
        take_positions(model, [{name: b[:16] for name, b in blocks()[0].items()}], 3, seed=0)


def test_draws_are_independent_and_repeat_with_the_seed():
    model = tiny_calm()
    hidden = torch.randn(1, 32).expand(40, -1)
    positions = Positions(hidden, torch.zeros(40, 4, dtype=torch.int64))
    predictor = Setting("direct").build(model, 100)
    drawn = draw_outcomes(predictor, positions, 3, seed=1)
    assert drawn.tokens.shape == (3, 40, 4) and drawn.draws.unique().tolist() == [1]
    assert len(drawn.tokens.flatten(0, 1).unique(dim=0)) > 20  # no two rows share their draws
    again = draw_outcomes(predictor, positions, 3, seed=1)
    assert torch.equal(drawn.tokens, again.tokens)
    other = draw_outcomes(predictor, positions, 3, seed=2)
    assert not torch.equal(drawn.tokens, other.tokens)


def test_a_vote_comes_nearer_to_the_exact_distribution_than_the_model():
    model = tiny_calm(vocab_size=2)
    hidden = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    positions = Positions(hidden, torch.zeros(60, 4, dtype=torch.int64))
    options = StudyOptions(
        temperatures=(0.5,), candidates=(200,), medoids=(8,), noise_temperatures=(0.1,), repeats=8
    )
    settings = settings_of(options, model)
    assert [s.temperature for s in settings if s.method == "noise_scale"] == [0.5, 0.1]
    study = run_study(model, positions, options)
    plain, exact, vote, *_, still = study.results
    assert exact.distances == [] and exact.draws > 2
    ((temperature, far, _),) = plain.distances
    ((_, near, error),) = vote.distances
    assert temperature == 0.5 and near < far / 3 and abs(near) < 4 * error + 0.01
    assert still.collision == 1.0 and plain.collision < exact.collision
    assert vote.draws == 200 and plain.draws == 1 and vote.against_vote is None


def test_models_with_more_than_their_head_show_it():
    """Learned temperatures within their range, and a readout; the other settings stay the same."""
    options = StudyOptions(temperatures=(0.5, 0.2), repeats=2)
    plain = settings_of(options, tiny_calm())
    model = tiny_calm(token_loss_weight=1.0, keep_token_readout=True, tempered_range=[0.3, 0.8])
    added = settings_of(options, model)
    assert added[: len(plain)] == plain
    assert [(s.method, s.temperature) for s in added[len(plain) :]] == [
        ("amortized", 0.5), ("readout", 1.0), ("readout", 0.5), ("readout", 0.2),
    ]  # fmt: skip
    few = StudyOptions(
        temperatures=(0.5,), candidates=(4, 20), medoids=(4,), noise_temperatures=(), repeats=2,
        max_draws=20,
    )  # fmt: skip
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    positions = Positions(hidden, torch.zeros(20, 4, dtype=torch.int64))
    study = run_study(model, positions, few)
    table = to_markdown(study)
    assert "| amortized, same T | readout, same T |" in table
    (learned,) = (r for r in study.results if r.setting.method == "amortized")
    (vote,) = (r for r in study.results if r.setting.num_samples == 20 and r.draws == 20)
    found = learned.against_vote
    assert found.accuracy == pytest.approx(learned.accuracy - vote.accuracy)
    assert found.collision == pytest.approx(learned.collision - vote.collision)
    low, high = found.collision_interval
    assert low <= found.collision <= high and "| amortized | 0.50 | " in table


def test_differences_are_paired():
    """Of equal shares they are zero at every resample; a shift shows without its noise."""
    shares = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) / 2
    found = difference((shares, 1.5 * shares), (shares, shares))
    assert found.accuracy == 0 and found.accuracy_interval == (0, 0)
    value = float(geometric_mean(shares.mean(0)))
    assert found.collision == pytest.approx(value / 2)
    low, high = found.collision_interval
    assert 0.4 * value < low < found.collision < high < 0.6 * value


def test_the_command_writes_table_record_and_figure(folders, tmp_path, capsys):
    words = ("--model", folders / "calm", "--data", folders / "text.txt", "--block-size", 64)
    out = ("--positions", 4, "--quick", "--output-dir", tmp_path)
    assert calm("experiment", "temperature", *words, *out) == 0
    text = capsys.readouterr().out
    table = (tmp_path / "temperature.md").read_text(encoding="utf-8")
    assert table in text and "| exact | 0.50 |" in table and "| medoid |" in table
    assert "| noise_scale | 0.50 |  | 0.25 |" in table and "(noise times 0.25)" in table
    record = json.loads((tmp_path / "temperature.json").read_text(encoding="utf-8"))
    assert record["measured_on"]["positions"] == 4
    assert record["measured_on"]["data"] == str(folders / "text.txt")
    methods = [result["setting"]["method"] for result in record["results"]]
    assert methods == ["direct", "exact", "batch", "medoid", "noise_scale", "direct"]
    assert (tmp_path / "temperature.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--positions", 1), "--positions must be at least 2"),
        (("--repeats", 1), "repeats must be at least 2"),
        (("--data", "no/such.txt"), "no/such.txt"),
    ],
    ids=["positions", "repeats", "data"],
)
def test_mistakes(words, message, folders, capsys):
    base = ("--model", folders / "calm", "--data", folders / "text.txt")
    assert message in error_of(capsys, "experiment", "temperature", *base, *words)


def test_the_baseline_has_no_draws_to_study(folders, capsys):
    words = ("--model", folders / "baseline", "--data", folders / "text.txt")
    assert "this study needs a CALM" in error_of(capsys, "experiment", "temperature", *words)
