"""Draws and what is computed from them: noise, reparameterization, expected distance."""

import pytest
import torch

from benchmarks.measure import Baseline, compare
from benchmarks.shapes import ENERGY, REPARAMETERIZE
from calm_kernels import expected_distance, normal_draws, reparameterize, uniform_draws
from calm_kernels.noise import Stream

REFERENCE = "reference backend"
ROWS, SIZE = REPARAMETERIZE.num_rows, REPARAMETERIZE.latent_size
ADDRESS = {"stream": Stream.LATENT, "seed": 1, "backend": "torch"}


def latent_inputs():
    states = torch.randn(ROWS, 2 * SIZE, requires_grad=True)
    return states, torch.randn(ROWS, SIZE), torch.rand(ROWS, SIZE) > 0.15


def draw(inputs, backend):
    states, epsilon, keep = inputs
    return reparameterize(
        states, kl_floor=0.5, dropout=0.15, latent_noise=epsilon, latent_keep=keep, backend=backend
    )


@pytest.mark.benchmark(group="reparameterize, fwd+bwd")
def bench_reparameterize(benchmark):
    inputs = latent_inputs()

    def step(backend):
        latent, kl = draw(inputs, backend)
        return torch.autograd.grad(latent.square().mean() + kl.mean(), inputs[0])

    baseline = Baseline(lambda: step("reference"))
    compare(benchmark, lambda: step("torch"), {REFERENCE: baseline}, shape=REPARAMETERIZE)


@pytest.mark.benchmark(group="reparameterize, fwd")
@torch.no_grad()
def bench_reparameterize_forward(benchmark):
    inputs = latent_inputs()
    baseline = Baseline(lambda: draw(inputs, "reference"), rtol=1.3e-6)
    compare(benchmark, lambda: draw(inputs, "torch"), {REFERENCE: baseline}, shape=REPARAMETERIZE)


def compare_noise(benchmark, ours, plain):
    """Seeded noise, which is the same on every device and in every batch split, against torch's."""

    def same_moments():
        drawn, given = ours(), plain(ROWS, SIZE)
        assert abs(drawn.mean() - given.mean()) < 0.01 and abs(drawn.std() - given.std()) < 0.01

    baseline = Baseline(lambda: plain(ROWS, SIZE), same_moments)
    compare(benchmark, ours, {f"torch.{plain.__name__}": baseline}, shape=REPARAMETERIZE)


@pytest.mark.benchmark(group="normal_draws")
def bench_normal_draws(benchmark):
    compare_noise(benchmark, lambda: normal_draws(ROWS, SIZE, **ADDRESS), torch.randn)


@pytest.mark.benchmark(group="uniform_draws")
def bench_uniform_draws(benchmark):
    compare_noise(benchmark, lambda: uniform_draws(ROWS, SIZE, **ADDRESS), torch.rand)


@pytest.mark.benchmark(group="expected_distance, fwd")
@torch.no_grad()
def bench_expected_distance(benchmark):
    """Against a mean over the published number of draws, which is right to a few percent."""
    offset = torch.randn(ENERGY.num_rows, ENERGY.latent_size)
    std = 0.3 * torch.rand(ENERGY.num_rows, ENERGY.latent_size) + 0.1

    def ours(method="auto"):
        return expected_distance(offset, std, 1.0, method=method)

    def drawn():
        draws = torch.randn(ENERGY.num_targets, ENERGY.num_rows, ENERGY.latent_size)
        return (offset + std * draws).norm(dim=-1).mean(0)

    baselines = {
        "mean of 100 draws": Baseline(drawn, rtol=2e-2, atol=0),
        "ours, quadrature": Baseline(lambda: ours("quadrature"), rtol=1e-4, atol=0),
    }
    compare(benchmark, ours, baselines, shape=ENERGY)
