"""What methods draw, against laws in closed form: chi-square and the means of Theorem 2."""

import itertools
import math

import pytest
import torch
from decoding_laws import ToySource, check_frequencies, row_seeds, sharpened

from calm.decoding.sampling.methods import build_method
from calm.decoding.sampling.voting import split_power

CHANCES = (0.5, 0.25, 0.15, 0.1)
TEMPERATURES = (0.9, 0.7, 0.5, 0.4, 1 / 3)
ROWS = 100_000


def expected_draws(chances, temperature):
    """Theorem 2: (n + [a > 0] sum P^(s-1)) / sum P^s."""
    power, (whole, fraction) = 1 / temperature, split_power(temperature)
    law = torch.tensor(chances, dtype=torch.float64)
    factory = (law ** (power - 1)).sum() if fraction else 0.0
    return float((whole + factory) / (law**power).sum())


def check_mean(values, expected):
    values = values.double()
    assert abs(values.mean() - expected) < 3 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize("temperature", TEMPERATURES, ids=lambda t: f"T{t:.2f}")
def test_algorithm_1_is_exact_and_takes_the_draws_of_theorem_2(temperature):
    source = ToySource(CHANCES, ROWS)
    method = build_method("exact", temperature=temperature, num_samples=8, max_draws=4000)
    chunk = method.choose(source, row_seeds(ROWS, first=17))
    assert not chunk.is_fallback.any()
    check_frequencies(source.numbers(chunk.tokens), sharpened(CHANCES, 1 / temperature))
    check_mean(chunk.draws, expected_draws(CHANCES, temperature))
    assert (chunk.saved >= 0).all() and (chunk.num_agreeing == int(1 / temperature + 1e-9)).all()
    if temperature < 0.4:  # rounds of three may stop at the second draw
        assert chunk.saved.double().mean() > 1


@pytest.mark.parametrize("wave", [1, 3, 50])
def test_the_exact_law_does_not_depend_on_the_size_of_waves(wave):
    rows = 20_000
    source = ToySource(CHANCES, rows)
    method = build_method("exact", temperature=0.4, num_samples=wave, max_draws=600)
    chunk = method.choose(source, row_seeds(rows))
    check_frequencies(source.numbers(chunk.tokens), sharpened(CHANCES, 2.5))
    check_mean(chunk.draws, expected_draws(CHANCES, 0.4))


def algorithm_2(chances, num_samples, temperature):
    """The law of the vote, by adding up all counts that N draws can give."""
    whole, fraction = split_power(temperature)
    total = torch.zeros(len(chances), dtype=torch.float64)
    for counts in itertools.product(range(num_samples + 1), repeat=len(chances)):
        if sum(counts) != num_samples:
            continue
        ways = math.factorial(num_samples)
        for count, chance in zip(counts, chances, strict=True):
            ways = ways / math.factorial(count) * chance**count
        for level in range(whole, -1, -1):
            weights = [vote_weight(c, num_samples, level, fraction) for c in counts]
            if sum(weights) > 0:
                break
        total += ways * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert total.sum() == pytest.approx(1.0)
    return total


def vote_weight(count, num_samples, level, fraction):
    """C(c, m) times the chance that the factory accepts within the other draws; c at level 0."""
    if level == 0 or count < level:
        return float(count if level == 0 else 0)
    if fraction == 0.0:
        return float(math.comb(count, level))
    hits, others = count - level, num_samples - level
    chance, survival = 0.0, 1.0
    for j in range(others - hits + 1 if hits else 0):
        chance += survival * hits / (others - j)
        survival *= (others - hits - j) / (others - j) * (1 - fraction / (j + 1))
    return math.comb(count, level) * chance


@pytest.mark.parametrize("num_samples", [1, 4, 10])
@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.4, 1 / 3], ids=lambda t: f"T{t:.2f}")
def test_algorithm_2_has_its_closed_form(temperature, num_samples):
    rows = 30_000
    source = ToySource(CHANCES, rows)
    method = build_method("batch", temperature=temperature, num_samples=num_samples)
    chunk = method.choose(source, row_seeds(rows))
    law = algorithm_2(CHANCES, num_samples, temperature)
    check_frequencies(source.numbers(chunk.tokens), law)
    assert (chunk.draws == num_samples).all()
    if (temperature, num_samples) == (0.5, 10):
        assert law[0] == pytest.approx(0.6721, abs=5e-5)  # for .7246: small N is flatter


def conditional(chances, first):
    """P given the first token: patches are (0, 0), (0, 1), (1, 0), (1, 1)."""
    law = torch.tensor(chances, dtype=torch.float64)
    law[2:] *= first == 1
    law[:2] *= first == 0
    return law / law.sum()


def complete(method, source, given_length, first=1):
    given = torch.full((len(source), 2), first)
    return method.complete(source, given, given_length, row_seeds(len(source), first=5))


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("exact", 0.9), ("exact", 0.5), ("exact", 0.4), ("batch", 0.5), ("batch", 0.4), ("direct", 1)],
)
def test_known_tokens_condition_every_method(name, temperature):
    """Sequences that know no token, one or all of them, side by side."""
    rows, num_samples = 30_000, 6
    source = ToySource(CHANCES, rows)
    method = build_method(name, temperature=temperature, num_samples=num_samples, max_draws=3000)
    given_length = torch.arange(rows) % 3
    chunk = complete(method, source, given_length)
    numbers = source.numbers(chunk.tokens)
    assert not chunk.is_fallback.any()
    for known, chances in ((0, CHANCES), (1, tuple(conditional(CHANCES, 1).tolist()))):
        law = sharpened(chances, 1 / temperature)
        if name == "batch":
            law = algorithm_2(chances, num_samples, temperature)
        check_frequencies(numbers[given_length == known], law)
    assert (numbers[given_length == 2] == 3).all()


def test_conditioning_costs_one_draw_over_the_chance_of_what_is_known():
    """A first token 1 has the chance 1/4 (Wald's identity)."""
    rows = 10_000
    source = ToySource(CHANCES, rows)
    ones = torch.ones(rows, dtype=torch.int64)
    direct = complete(build_method("direct", temperature=1.0), source, ones)
    check_mean(direct.draws, 1 / 0.25)
    exact = build_method("exact", temperature=0.4, num_samples=32, max_draws=4000)
    chunk = complete(exact, source, ones)
    expected = expected_draws(conditional(CHANCES, 1)[2:].tolist(), 0.4)
    check_mean(chunk.draws, expected / 0.25)


@pytest.mark.parametrize("temperature", [0.7, 1 / 3], ids=lambda t: f"T{t:.2f}")
def test_at_its_cap_algorithm_1_is_algorithm_2_over_all_its_draws(temperature):
    """A law over 400 patches, almost none of which repeats: rounds do not come to an end."""
    patches = torch.stack([torch.arange(400) // 20, torch.arange(400) % 20], 1)
    source = ToySource([1 / 400] * 400, 50, patches)
    method = build_method("exact", temperature=temperature, num_samples=8, max_draws=24)
    seed = row_seeds(50)
    chunk = method.choose(source, seed)
    assert chunk.is_fallback.float().mean() > 0.8
    assert ((chunk.draws - chunk.saved)[chunk.is_fallback] == 24).all()
    assert (chunk.num_agreeing[chunk.is_fallback] < 1 / temperature).all()
    again = method.choose(source, seed)
    assert torch.equal(chunk.tokens, again.tokens)
