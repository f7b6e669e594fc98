"""The quality of a latent space: reconstruction under noise, and what needs no context."""

import pytest
import torch
from tiny_models import tiny_calm

from calm.experiments.latent_space import (
    NOISE_SIZES,
    latent_noise,
    latent_quality,
    unconditional_energy,
)


@pytest.fixture
def model():
    return tiny_calm()


def blocks():
    ids = torch.randint(5, (6, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 40:] = -100
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]


def test_noise_loses_tokens(model):
    found = latent_quality(model, blocks())
    shares = [found.accuracy[size] for size in NOISE_SIZES]
    assert shares[0] > shares[-1] > 0
    assert found.posterior_std > 0 and found.spread > 0


def test_noise_on_draws_is_undone(model):
    hidden = torch.randn(3, 32)
    sample = model.generative_head.sample
    plain = sample(hidden, num_samples=50, seed=1)
    with latent_noise(model, 2.0):
        noisy = model.generative_head.sample(hidden, num_samples=50, seed=1)
    assert (noisy - plain).std().item() == pytest.approx(2.0, rel=0.1)
    assert torch.equal(model.generative_head.sample(hidden, num_samples=50, seed=1), plain)


def test_the_unconditional_energy_is_that_of_latents_of_the_text(model):
    """Of N(0, 1) latents, E|y - y'| = 2 Γ((L + 1) / 2) / Γ(L / 2)."""
    encoder = model.ae_model.encoder
    width = model.config.latent_size

    def standard_normal(input_ids):
        means = torch.randn(len(input_ids), 1, width, generator=torch.Generator().manual_seed(3))
        return torch.cat([means * 0.6, torch.full_like(means, 0.8).log()], dim=-1)

    half = torch.tensor(width / 2)
    expected = 2 * (torch.lgamma(half + 0.5) - torch.lgamma(half)).exp().item()
    many = blocks() * 40
    encoder.forward = standard_normal
    assert unconditional_energy(model, many) == pytest.approx(expected, rel=0.02)
