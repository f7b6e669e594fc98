"""Diagnostics on distributions whose true values are known, and the measures of whole models."""

import math

import pytest
import torch
from tiny_models import tiny_baseline, tiny_calm

from calm.errors import UserError
from calm.evaluation.diagnostics import (
    ADVICE,
    advice,
    conditioning_gap,
    draw_agreement,
    energy_floor,
    spread_ratio,
    vote_margin,
)
from calm.evaluation.measures import measure_text
from calm.evaluation.paired import common_positions, paired_means
from calm_kernels.energy_score import expected_distance, gaussian_energy_score

DISTRIBUTION = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("draws", [2, 5])
def test_agreement_is_the_chance_that_two_draws_agree(draws):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(DISTRIBUTION, draws * 20_000, True, generator=generator)
    chunks = torch.stack([drawn, 7 - drawn], dim=-1).view(draws, 20_000, 2)
    found = draw_agreement(chunks)
    expected = DISTRIBUTION.square().sum().item()
    assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / 20_000**0.5)
    apart = chunks.clone()
    apart[..., 1] = torch.arange(draws)[:, None]  # the same first tokens, never the same chunk
    assert draw_agreement(apart).max() == 0


def test_margin_counts_winner_and_runner_up():
    rows = [[1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 3, 4], [5] * 6, [1, 2, 3, 4, 5, 6], [9, 8, 8, 9, 9, 9]]
    draws = torch.tensor(rows).T[..., None]
    assert (6 * vote_margin(draws)).tolist() == pytest.approx([1, 0, 6, 0, 2])
    doubled = torch.cat([torch.zeros_like(draws), draws], dim=-1)
    assert torch.equal(vote_margin(doubled), vote_margin(draws))


@pytest.mark.parametrize("width", [1, 6])
def test_the_floor_is_the_mean_distance_of_two_draws_of_the_posterior(width):
    std = 0.3
    log_std = torch.full((2, width), math.log(std), dtype=torch.float64)
    # |N(0, 2 std^2 I)| follows a chi distribution.
    chi = math.gamma((width + 1) / 2) / math.gamma(width / 2)
    expected = torch.full((2,), 2 * std * chi, dtype=torch.float64)
    torch.testing.assert_close(energy_floor(log_std), expected)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_a_head_that_draws_from_the_posterior_reaches_the_floor_and_no_other_does(exponent):
    generator = torch.Generator().manual_seed(1)
    rows, draws, width = 4000, 8, 6
    mean = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    log_std = 0.3 * torch.randn(rows, width, generator=generator, dtype=torch.float64) - 1
    noise = torch.randn(draws, rows, width, generator=generator, dtype=torch.float64)
    floor = energy_floor(log_std, exponent)

    def excess(samples):
        over = -gaussian_energy_score(samples, mean, log_std, exponent=exponent) - floor
        return over.mean().item(), over.std().item() / rows**0.5

    std = log_std.exp()
    value, error = excess(mean + std * noise)
    assert abs(value) < 4 * error
    for wrong in (mean + 0.3 * std * noise, mean + 2.5 * std * noise, mean + std * (noise + 1)):
        value, error = excess(wrong)
        assert value > 6 * error


def test_spread_is_one_at_the_truth_and_tells_narrow_from_wide():
    generator = torch.Generator().manual_seed(2)
    mean, log_std = torch.zeros(3000, 6), torch.full((3000, 6), -1.0)
    noise = torch.randn(8, 3000, 6, generator=generator)
    found = []
    for factor in (0.0, 0.3, 1.0, 10.0):
        samples = factor * log_std.exp() * noise
        _, terms = gaussian_energy_score(samples, mean, log_std, return_diagnostics=True)
        found.append(spread_ratio(terms.fidelity.mean(), terms.diversity.mean()).item())
    assert found[0] == 0 and found[1] < 0.5 and found[3] > 1.3
    assert found[2] == pytest.approx(1, abs=0.01)


def test_the_gap_is_what_the_wrong_position_costs():
    generator = torch.Generator().manual_seed(3)
    mean = 2 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    log_std = torch.full_like(mean, -0.5)
    noise = log_std.exp() * torch.randn(8, *mean.shape, generator=generator, dtype=torch.float64)

    def loss(samples):
        return -gaussian_energy_score(samples, mean, log_std)

    shifted = mean.roll(1, 0)
    gap = conditioning_gap(loss(mean + noise), loss(shifted + noise))
    spread = math.sqrt(2) * log_std.exp()
    expected = 2 * (expected_distance(shifted - mean, spread) - expected_distance(0 * mean, spread))
    difference = gap - expected
    assert abs(difference.mean()) < 4 * difference.std() / len(mean) ** 0.5
    assert conditioning_gap(loss(noise), loss(noise)).abs().max() == 0  # ignores the position


def test_advice_is_given_beyond_a_threshold_alone():
    sound = {
        "collapsed": 0.1, "reconstruction": 0.999, "conditioning_share": 0.3, "spread_ratio": 1.0,
        "floor_share": 0.5, "draw_agreement": 0.2, "vote_margin": 0.3,
    }  # fmt: skip
    assert advice(sound) == [] and set(sound) == set(ADVICE)
    for name, entry in ADVICE.items():
        for value in (entry.low, entry.high):
            if value is not None:
                (line,) = advice({**sound, name: value * (0.9 if value == entry.low else 1.1)})
                assert line.startswith(f"{name} is ") and entry.text in line
    assert advice({}) == []


def blocks(count, length=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(1, 5, (count, length), generator=generator))


@pytest.mark.parametrize("head", ["energy", "flow"])
def test_measures_do_not_depend_on_the_batch_and_miss_masked_chunks(head):
    model, text = tiny_calm(head), blocks(3)
    one, all_at_once = (measure_text(model, text, batch_size=size, seed=3) for size in (1, 3))
    torch.testing.assert_close(one.scores.terms, all_at_once.scores.terms, rtol=1e-5, atol=1e-5)
    assert one.collapsed == all_at_once.collapsed == model.ae_model.collapsed(one.dimension_kl)
    torch.testing.assert_close(one.dimension_kl, all_at_once.dimension_kl, rtol=1e-5, atol=1e-6)
    masked = [{"input_ids": block, "labels": block.clone()} for block in text]
    masked[1]["labels"][12:] = -100
    cut = measure_text(model, masked, seed=3)
    assert cut.scores.offsets.tolist() == [*range(4, 32, 4), 36, 40, *range(48, 76, 4)]
    rows = [*range(7), *range(14, 21)]  # of the whole blocks
    kept = [*range(7), *range(9, 16)]
    torch.testing.assert_close(cut.scores.terms[kept], one.scores.terms[rows], rtol=1e-5, atol=1e-5)


def test_the_energy_loss_is_the_models_own():
    """Of a model with the same exponent: over many draws both have the same mean."""
    model, text = tiny_calm(beta=1.3), blocks(4)
    found = measure_text(model, text, num_samples=64, exponent=1.3).values()
    model.config.num_samples = 64
    ids = torch.stack(text)
    with torch.no_grad():
        loss = model(ids, ids, seed=0).loss.item()
    assert found["energy"] == pytest.approx(loss, rel=0.02)
    assert found["energy"] == pytest.approx(found["fidelity"] - found["diversity"])
    assert found["excess"] == pytest.approx(found["energy"] - found["floor"])
    assert found["excess"] > 0


def test_the_gap_of_a_model_compares_it_with_another_position():
    text = blocks(2)
    scores = measure_text(tiny_calm(), text).scores
    gap = scores.terms[:, scores.names.index("conditioning_gap")]
    assert (gap != 0).all()
    short = [{"input_ids": block, "labels": block.clone()} for block in text]
    for block in short:
        block["labels"][8:] = -100  # one position, and no other
    assert measure_text(tiny_calm(), short).values()["conditioning_gap"] == 0
    assert measure_text(tiny_calm("flow"), text).values()["conditioning_gap"] == 0  # untrained


def test_two_models_on_one_autoencoder_are_paired():
    first, second = tiny_calm(), tiny_calm()
    with torch.no_grad():
        second.mlp_generator.final_layer.linears[-1].bias.add_(0.5)
    text = blocks(6)
    measured = [measure_text(model, text).scores for model in (first, second)]
    floor = measured[0].names.index("floor")
    assert torch.equal(measured[0].terms[:, floor], measured[1].terms[:, floor])
    one, two = (scores.grouped(32) for scores in common_positions(measured))
    paired = paired_means(one[0], one[1], two[0], measured[0].names, seed=0)
    own = measured[0].terms - measured[1].terms
    assert paired.difference["energy"] == pytest.approx(own[:, 0].mean().item())
    assert paired.difference["energy"] < 0 and not paired.is_tied("energy")
    assert paired.is_tied("floor")


def test_the_baselines_cross_entropy_is_its_loss():
    model, ids = tiny_baseline(vocab_size=5), torch.stack(blocks(3))
    measured = measure_text(model, list(ids))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert measured.values() == {"cross_entropy": pytest.approx(loss)}
    assert measured.scores.offsets[:4].tolist() == [1, 2, 3, 4]
    assert measured.standard_errors()["cross_entropy"] > 0


def test_bad_input_to_measures():
    with pytest.raises(UserError, match="num_samples must be at least 2, got 1"):
        measure_text(tiny_calm(), blocks(1), num_samples=1)
    nothing = {"input_ids": blocks(1)[0], "labels": torch.full((32,), -100)}
    with pytest.raises(UserError, match="no position is left to measure"):
        measure_text(tiny_calm(), [nothing])
