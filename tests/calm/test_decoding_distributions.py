"""Draws of the methods against closed forms: chi-square, and the means of Theorem 2."""

import itertools
import math

import pytest
import torch
from decoding_distributions import ToyDistribution, check_frequencies, row_seeds, sharpened

from calm.decoding.sampling.methods import build_method
from calm.decoding.sampling.voting import split_power

CHANCES = (0.5, 0.25, 0.15, 0.1)
TEMPERATURES = (0.9, 0.7, 0.5, 0.4, 1 / 3)
ROWS = 100_000


def expected_draws(chances, temperature):
    """Theorem 2: (n + [a > 0] sum P^(s-1)) / sum P^s."""
    power, (whole, fraction) = 1 / temperature, split_power(temperature)
    probabilities = torch.tensor(chances, dtype=torch.float64)
    factory = (probabilities ** (power - 1)).sum() if fraction else 0.0
    return float((whole + factory) / (probabilities**power).sum())


def check_mean(values, expected):
    values = values.double()
    assert abs(values.mean() - expected) < 3 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=lambda t: f"T{t:.2f}")
def test_algorithm_1_is_exact_and_takes_the_draws_of_theorem_2(temperature):
    distribution = ToyDistribution(CHANCES, ROWS)
    method = build_method("exact", temperature=temperature, num_samples=8, max_draws=4000)
    chunk = method.choose(distribution, row_seeds(ROWS, first=17))
    assert not chunk.is_fallback.any()
    check_frequencies(distribution.numbers(chunk.tokens), sharpened(CHANCES, 1 / temperature))
    check_mean(chunk.draws, expected_draws(CHANCES, temperature))
    assert (chunk.saved >= 0).all() and (chunk.num_agreeing == int(1 / temperature + 1e-9)).all()
    if temperature < 0.4:  # rounds of three may stop at the second draw
        assert chunk.saved.double().mean() > 1


@pytest.mark.parametrize("wave", [1, 3, 50])
def test_the_exact_distribution_does_not_depend_on_the_size_of_waves(wave):
    rows = 20_000
    distribution = ToyDistribution(CHANCES, rows)
    method = build_method("exact", temperature=0.4, num_samples=wave, max_draws=600)
    chunk = method.choose(distribution, row_seeds(rows))
    check_frequencies(distribution.numbers(chunk.tokens), sharpened(CHANCES, 2.5))
    check_mean(chunk.draws, expected_draws(CHANCES, 0.4))


def algorithm_2(chances, num_samples, temperature):
    """The distribution of the vote, by adding up all counts that N draws can give."""
    whole, fraction = split_power(temperature)
    total = torch.zeros(len(chances), dtype=torch.float64)
    for counts in itertools.product(range(num_samples + 1), repeat=len(chances)):
        if sum(counts) != num_samples:
            continue
        ways = math.factorial(num_samples)
        for count, chance in zip(counts, chances, strict=True):
            ways = ways / math.factorial(count) * chance**count
        for num_agreeing in range(whole, -1, -1):
            weights = [vote_weight(c, num_samples, num_agreeing, fraction) for c in counts]
            if sum(weights) > 0:
                break
        total += ways * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert total.sum() == pytest.approx(1.0)
    return total


def vote_weight(count, num_samples, num_agreeing, fraction):
    """C(c, m) times the chance that the factory accepts within the other draws; c for m = 0."""
    if num_agreeing == 0 or count < num_agreeing:
        return float(count if num_agreeing == 0 else 0)
    if fraction == 0.0:
        return float(math.comb(count, num_agreeing))
    hits, others = count - num_agreeing, num_samples - num_agreeing
    chance, survival = 0.0, 1.0
    for j in range(others - hits + 1 if hits else 0):
        chance += survival * hits / (others - j)
        survival *= (others - hits - j) / (others - j) * (1 - fraction / (j + 1))
    return math.comb(count, num_agreeing) * chance


@pytest.mark.parametrize("num_samples", [1, 4, 10])
@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.4, 1 / 3], ids=lambda t: f"T{t:.2f}")
def test_algorithm_2_has_its_closed_form(temperature, num_samples):
    rows = 30_000
    distribution = ToyDistribution(CHANCES, rows)
    method = build_method("batch", temperature=temperature, num_samples=num_samples)
    chunk = method.choose(distribution, row_seeds(rows))
    probabilities = algorithm_2(CHANCES, num_samples, temperature)
    check_frequencies(distribution.numbers(chunk.tokens), probabilities)
    assert (chunk.draws == num_samples).all()
    if (temperature, num_samples) == (0.5, 10):
        assert probabilities[0] == pytest.approx(0.6721, abs=5e-5)  # for .7246: small N is flatter


def conditional(chances, first):
    """P given the first token: chunks are (0, 0), (0, 1), (1, 0), (1, 1)."""
    probabilities = torch.tensor(chances, dtype=torch.float64)
    probabilities[2:] *= first == 1
    probabilities[:2] *= first == 0
    return probabilities / probabilities.sum()


def complete(method, distribution, given_length, first=1):
    given = torch.full((len(distribution), 2), first)
    return method.complete(distribution, given, given_length, row_seeds(len(distribution), first=5))


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("exact", 0.9), ("exact", 0.5), ("exact", 0.4), ("batch", 0.5), ("batch", 0.4), ("direct", 1)],
)
def test_given_tokens_condition_every_method(name, temperature):
    """Sequences of one batch that are given no token, one token, or all of them."""
    rows, num_samples = 30_000, 6
    distribution = ToyDistribution(CHANCES, rows)
    method = build_method(name, temperature=temperature, num_samples=num_samples, max_draws=3000)
    given_length = torch.arange(rows) % 3
    chunk = complete(method, distribution, given_length)
    numbers = distribution.numbers(chunk.tokens)
    assert not chunk.is_fallback.any()
    for known, chances in ((0, CHANCES), (1, tuple(conditional(CHANCES, 1).tolist()))):
        probabilities = sharpened(chances, 1 / temperature)
        if name == "batch":
            probabilities = algorithm_2(chances, num_samples, temperature)
        check_frequencies(numbers[given_length == known], probabilities)
    assert (numbers[given_length == 2] == 3).all()


def test_conditioning_costs_one_draw_over_the_chance_of_the_given_tokens():
    """A first token 1 has the chance 1/4 (Wald's identity)."""
    rows = 10_000
    distribution = ToyDistribution(CHANCES, rows)
    ones = torch.ones(rows, dtype=torch.int64)
    direct = complete(build_method("direct", temperature=1.0), distribution, ones)
    check_mean(direct.draws, 1 / 0.25)
    exact = build_method("exact", temperature=0.4, num_samples=32, max_draws=4000)
    chunk = complete(exact, distribution, ones)
    expected = expected_draws(conditional(CHANCES, 1)[2:].tolist(), 0.4)
    check_mean(chunk.draws, expected / 0.25)


@pytest.mark.parametrize("temperature", [0.7, 1 / 3], ids=lambda t: f"T{t:.2f}")
def test_at_its_cap_algorithm_1_is_algorithm_2_over_all_its_draws(temperature):
    """400 equally likely chunks, almost none of which repeats: no round succeeds."""
    chunks = torch.stack([torch.arange(400) // 20, torch.arange(400) % 20], 1)
    distribution = ToyDistribution([1 / 400] * 400, 50, chunks)
    method = build_method("exact", temperature=temperature, num_samples=8, max_draws=24)
    seed = row_seeds(50)
    chunk = method.choose(distribution, seed)
    assert chunk.is_fallback.float().mean() > 0.8
    assert ((chunk.draws - chunk.saved)[chunk.is_fallback] == 24).all()
    assert (chunk.num_agreeing[chunk.is_fallback] < 1 / temperature).all()
    again = method.choose(distribution, seed)
    assert torch.equal(chunk.tokens, again.tokens)
