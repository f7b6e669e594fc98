"""Brier-n of a model whose every n-gram has a known probability: a Markov chain of tokens.

What is tested is all of `position_scores` but the network: draws, pairs, chains and rollouts.
"""

from types import SimpleNamespace

import pytest
import torch

from calm.evaluation.brier import position_scores
from calm.evaluation.samplers import CALMSampler
from calm_kernels.noise import Stream, as_seed, uniform

CHAIN = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.05, 0.15, 0.8]], dtype=torch.float64)
VOCAB = len(CHAIN)


class ChainModel:
    """Draws the next chunk token by token, each after the one before; the state is a one-hot."""

    def __init__(self, patch_size):
        self.patch_size = patch_size

    def distribution(self, hidden):
        return SimpleNamespace(latents=lambda count, seed, **_: self.draw(hidden, count, seed))

    def draw(self, hidden, count, seed):
        points = uniform(
            len(hidden), self.patch_size, stream=Stream.HEAD, seed=seed, num_draws=count
        )
        token = hidden.argmax(-1).expand(count, -1)
        tokens = []
        for point in points.double().unbind(-1):
            token = (CHAIN.cumsum(-1)[token][..., :-1] <= point[..., None]).sum(-1)
            tokens.append(token)
        return torch.stack(tokens, dim=-1).float()

    def decode_latents(self, latents):
        return latents.long()

    def decode_compared(self, latents, target):
        return latents.long()


class ChainBackbone:
    """Hands its inputs on, and counts them in the cache as a transformer would."""

    config = SimpleNamespace(_attn_implementation="sdpa")

    def __call__(self, *, inputs_embeds, past_key_values, **_):
        past_key_values.update(*(inputs_embeds[:, None],) * 2, 0)
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def chain_sampler(patch_size, draws, *, is_published=False, seed=0):
    predictor = SimpleNamespace(
        model=ChainModel(patch_size),
        backbone=ChainBackbone(),
        patch_size=patch_size,
        method=SimpleNamespace(noise_scale=1.0),
        embed=lambda ids: torch.nn.functional.one_hot(ids[:, patch_size - 1 :: patch_size], VOCAB)
        .float(),
    )  # fmt: skip
    return CALMSampler(predictor, draws, is_published, as_seed(seed, "cpu"))


def known(ids, starts):
    """P(y), sum P^2 and sum P^3 of the n-gram after each token before `starts`, ``[starts, 4]``."""
    chances, squares, cubes = [], [], []
    power = {2: torch.ones(VOCAB, dtype=torch.float64), 3: torch.ones(VOCAB, dtype=torch.float64)}
    by_state = {2: [], 3: []}
    for _ in range(4):
        for order in power:
            power[order] = CHAIN.pow(order) @ power[order]
            by_state[order].append(power[order])
    for start in starts:
        steps = CHAIN[ids[start - 1 : start + 3], ids[start : start + 4]]
        chances.append(steps.cumprod(0))
        squares.append(torch.stack([value[ids[start - 1]] for value in by_state[2]]))
        cubes.append(torch.stack([value[ids[start - 1]] for value in by_state[3]]))
    return torch.stack(chances), torch.stack(squares), torch.stack(cubes)


def scored(patch_size, draws, rows, **options):
    """Scores of one sequence, drawn `rows` times: ``[rows, starts, 4]``, and its known values."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCAB, (24,), generator=generator)
    scores = position_scores(
        chain_sampler(patch_size, draws, **options), ids.expand(rows, -1), None
    )
    assert scores.is_counted.all()
    return scores.terms, known(ids, scores.token.tolist())


@pytest.fixture(autouse=True)
def plain_cache(monkeypatch):
    from transformers import DynamicCache

    monkeypatch.setattr("calm.evaluation.rollout.DynamicCache", lambda config: DynamicCache())


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("is_published", [False, True], ids=["all", "published"])
def test_every_position_is_unbiased(patch_size, is_published):
    rows = 4000
    terms, (chance, square, _) = scored(
        patch_size, 2 if is_published else 5, rows, is_published=is_published
    )
    errors = (terms.mean(0) - (2 * chance - square)) / (terms.std(0) / rows**0.5 + 1e-9)
    assert errors.abs().max() < 5, errors
    assert abs(errors.mean()) < 1  # nor is there a small bias that all share


@pytest.mark.parametrize("draws", [2, 4, 8])
@pytest.mark.parametrize("patch_size", [4, 8])
def test_the_variance_is_that_of_the_formula(patch_size, draws):
    """Var = 4 p (1 - p) / m + [4 (m - 2) z1 + 2 z2] / (m (m - 1)) - 8 p (p - S) / m."""
    terms, (chance, square, cube) = scored(patch_size, draws, 8000)
    z1, z2 = cube - square**2, square * (1 - square)
    expected = (
        4 * chance * (1 - chance) / draws
        + (4 * (draws - 2) * z1 + 2 * z2) / (draws * (draws - 1))
        - 8 * chance * (chance - square) / draws
    )
    found = terms.var(0)
    assert ((found - expected).abs() < 0.12 * expected + 2e-3).all(), (found, expected)
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=0.02)


def test_more_draws_lower_the_variance_of_rollouts():
    spread = [scored(2, draws, 3000)[0].var(0).mean().item() for draws in (2, 4, 8)]
    assert spread[0] > 1.5 * spread[1] > 1.5**2 * spread[2] * 0.8
