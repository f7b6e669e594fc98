"""Tokens drawn from the softmax of their logits, in every backend."""

import math

import pytest
import torch

from calm_kernels import noise, softmax_draws
from calm_kernels.noise import Stream

INFINITY, NAN = float("inf"), float("nan")


def points(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def test_tokens_of_known_probabilities(backend):
    """Chances 1/8, 1/2, 0, 3/8: a token begins where the sum of those before it is reached."""
    logits = torch.tensor([[math.log(1), math.log(4), -200.0, math.log(3)]])
    uniforms = points(0.0, 0.1249, 0.1251, 0.6249, 0.6251, 1 - 2**-24)
    tokens, is_finite = softmax_draws(logits, uniforms, backend=backend)
    assert tokens.tolist() == [[0, 0, 1, 1, 3, 3]] and is_finite.tolist() == [True]
    assert tokens.dtype == torch.int64 and is_finite.dtype == torch.bool
    # At T = 1/2 chances are 1/26, 16/26, 0, 9/26.
    tokens, _ = softmax_draws(logits, points(0.03, 0.04, 0.65, 0.66), temperature=0.5)
    assert tokens.tolist() == [[0, 1, 1, 3]]


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-30])
def test_the_coldest_take_the_first_of_the_largest(temperature, backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, 0.0, -2.0]])
    uniforms = torch.tensor([[0.0, 0.4], [0.0, 0.4]], dtype=torch.float64)
    tokens, is_finite = softmax_draws(logits, uniforms, temperature=temperature, backend=backend)
    assert tokens.tolist() == [[1, 1], [0, 0]] and is_finite.all()


def test_frequencies_are_the_probabilities(generator, backend):
    logits = torch.randn(2, 7, generator=generator)
    count = 2000
    tokens, _ = softmax_draws(logits, num_draws=count, seed=5, backend=backend)
    assert tokens.shape == (2, count)
    found = torch.stack([(tokens == token).double().mean(-1) for token in range(7)], -1)
    chances = logits.double().softmax(-1)
    assert ((found - chances).abs() < 4 * (chances * (1 - chances) / count).sqrt()).all()


def test_drawn_points_are_those_of_the_stream(generator, backend):
    """Each sequence with a seed of its own, and rows of one seed."""
    logits = torch.randn(3, 50, generator=generator)
    for seed in (torch.tensor([[3, 0], [2**40, 2**35], [-1, 7]]), 11):
        uniforms = noise.uniform(
            3, 1, stream=Stream.HEAD, seed=seed, num_draws=4, dtype=torch.float64
        )[..., 0].T  # fmt: skip
        options = {"seed": seed, "num_draws": 4, "stream": Stream.HEAD, "backend": backend}
        tokens, _ = softmax_draws(logits, **options)
        assert torch.equal(tokens, softmax_draws(logits, uniforms, backend=backend)[0])


def test_what_is_not_finite(backend):
    """Also what overflows only as logits / T; tokens stay in the vocabulary."""
    logits = torch.zeros(5, 6)
    logits[1, 5], logits[2, 0], logits[3, 2], logits[4, 1] = INFINITY, NAN, -INFINITY, 1e30
    for temperature in (1e-20, 0.0):
        options = {"temperature": temperature, "seed": 1, "backend": backend}
        tokens, is_finite = softmax_draws(logits, **options)
        assert is_finite.tolist() == [True, False, False, False, temperature == 0.0]
        assert ((tokens >= 0) & (tokens < 6)).all()


def test_one_token_and_no_row(backend):
    tokens, is_finite = softmax_draws(torch.zeros(2, 1), seed=3, backend=backend)
    assert tokens.tolist() == [[0], [0]] and is_finite.all()
    seeds = torch.zeros(0, 2, dtype=torch.int64)
    tokens, is_finite = softmax_draws(torch.zeros(0, 4), seed=seeds, backend=backend)
    assert tokens.shape == (0, 1) and is_finite.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4)}, ValueError, r"logits must have shape \[R, V\] with V >= 1"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"got \(4, 0\)"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must have dtype float64"),
        ({"uniforms": torch.zeros(2, 3)}, TypeError, "uniforms must have dtype float64"),
        ({"uniforms": points(0.5)}, ValueError, r"uniforms must have shape \[2, N\] with N >= 1"),
        ({"uniforms": points().T.expand(0, 1)}, ValueError, r"got \(0, 1\)"),
        ({"temperature": -0.5}, ValueError, "temperature must be finite and at least 0, got -0.5"),
        ({"temperature": INFINITY}, ValueError, "temperature must be finite"),
        ({"num_draws": 0}, ValueError, "num_draws must be at least 1, got 0"),
        ({"seed": torch.zeros(3, 2).long()}, ValueError, "seed has 3 rows for 2 rows"),
    ],
)
def test_bad_input(change, error, message, backend):
    with pytest.raises(error, match=message):
        softmax_draws(**{"logits": torch.zeros(2, 3)} | change, backend=backend)
