"""The energy score of a text and what it lies between; the quality of a latent space."""

import pytest
import torch
from tiny_models import tiny_calm

from calm.errors import UserError
from calm.evaluation.energy import ENERGY_TERMS, energy_sums
from calm.experiments.latent_space import NOISE_SIZES, latent_noise, latent_quality

BLOCKS = 6


@pytest.fixture
def model():
    return tiny_calm()


def blocks():
    ids = torch.randint(5, (BLOCKS, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 40:] = -100
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]


def means(model, **options):
    sums, counts = energy_sums(model, blocks(), **options)
    assert counts.tolist() == [15, 9, 15, 15, 15, 15]
    return dict(zip(ENERGY_TERMS, (sums.sum(0) / counts.sum()).tolist(), strict=True))


def draw_from_posterior(model, monkeypatch):
    """Replace the head by one that knows the posterior of every chunk."""
    known, ask = [], model.predicted
    generator = torch.Generator().manual_seed(1)

    def predicted(*args):
        hidden, posterior = ask(*args)
        known[:] = [posterior]
        return hidden, posterior

    def sample(hidden, num_samples, **_):
        mean, log_std, _ = known[0]
        return mean + log_std.exp() * torch.randn(num_samples, *mean.shape, generator=generator)

    monkeypatch.setattr(model, "predicted", predicted)
    monkeypatch.setattr(model.generative_head, "sample", sample)


def test_the_posterior_itself_scores_the_floor(model, monkeypatch):
    before = means(model)
    assert before["energy"] > 1.05 * before["floor"]
    assert before["energy"] == pytest.approx(before["fidelity"] - before["diversity"], rel=1e-4)
    draw_from_posterior(model, monkeypatch)
    after = means(model, num_samples=64)
    assert after["floor"] == pytest.approx(before["floor"], rel=1e-5)
    assert after["energy"] == pytest.approx(after["floor"], rel=0.02)


def test_a_head_that_knows_no_context_scores_alike_everywhere(model, monkeypatch):
    found = means(model)
    assert found["other_context"] != pytest.approx(found["energy"], rel=1e-3)
    draw = model.generative_head.sample
    monkeypatch.setattr(
        model.generative_head, "sample", lambda hidden, **o: draw(torch.zeros_like(hidden), **o)
    )
    found = means(model)
    assert found["other_context"] == pytest.approx(found["energy"], rel=1e-6)


def test_batches_change_rounding_alone(model):
    together, apart = means(model), means(model, batch_size=2)
    for name in ENERGY_TERMS[:-1]:
        assert together[name] == pytest.approx(apart[name], rel=1e-5)


def test_mistakes(model):
    with pytest.raises(UserError, match="num_samples must be at least 2"):
        energy_sums(model, blocks(), num_samples=1)
    with pytest.raises(UserError, match="no blocks"):
        energy_sums(model, [])


def test_latent_quality(model):
    found = latent_quality(model, blocks())
    shares = [found.accuracy[size] for size in NOISE_SIZES]
    assert shares[0] > shares[-1] and 0 <= found.collapsed <= 1
    assert found.posterior_std > 0 and found.spread > 0


def test_noise_on_latents_is_undone(model):
    hidden = torch.randn(3, 32)
    sample = model.generative_head.sample
    plain = sample(hidden, num_samples=50, seed=1)
    with latent_noise(model, 2.0):
        noisy = model.generative_head.sample(hidden, num_samples=50, seed=1)
    assert (noisy - plain).std().item() == pytest.approx(2.0, rel=0.1)
    assert torch.equal(model.generative_head.sample(hidden, num_samples=50, seed=1), plain)
