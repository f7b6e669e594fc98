"""Draws and what depends on them: noise, the reparameterization, the expected distance."""

import pytest
import torch

from benchmarks.measure import compare
from benchmarks.shapes import ENERGY, REPARAMETERIZE
from calm_kernels import expected_distance, noise, reparameterize

REFERENCE = "published formula"
ROWS, SIZE = REPARAMETERIZE.num_rows, REPARAMETERIZE.latent_size


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

    torch.testing.assert_close(step("torch"), step("reference"), rtol=1e-3, atol=1e-5)
    rivals = {REFERENCE: lambda: step("reference")}
    compare(benchmark, lambda: step("torch"), rivals, shape=REPARAMETERIZE)


@pytest.mark.benchmark(group="reparameterize, fwd")
@torch.no_grad()
def bench_reparameterize_forward(benchmark):
    inputs = latent_inputs()
    torch.testing.assert_close(draw(inputs, "torch"), draw(inputs, "reference"))
    rivals = {REFERENCE: lambda: draw(inputs, "reference")}
    compare(benchmark, lambda: draw(inputs, "torch"), rivals, shape=REPARAMETERIZE)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def bench_noise(benchmark, kind):
    """The price of draws that are addressed: the same on every device and in every split."""
    benchmark.group = f"noise.{kind}"
    function = getattr(noise, kind)
    rival = {"normal": torch.randn, "uniform": torch.rand}[kind]

    def ours():
        return function(ROWS, SIZE, stream=noise.Stream.LATENT, seed=1)

    drawn, given = ours(), rival(ROWS, SIZE)
    assert abs(drawn.mean() - given.mean()) < 0.01 and abs(drawn.std() - given.std()) < 0.01
    rivals = {f"torch.{rival.__name__}": lambda: rival(ROWS, SIZE)}
    compare(benchmark, ours, rivals, shape=REPARAMETERIZE)


@pytest.mark.benchmark(group="expected_distance, fwd")
@torch.no_grad()
def bench_expected_distance(benchmark):
    """Against a mean over the published number of draws, which is exact to a few percent."""
    offset = torch.randn(ENERGY.num_rows, ENERGY.latent_size)
    std = 0.3 * torch.rand(ENERGY.num_rows, ENERGY.latent_size) + 0.1

    def ours(method="auto"):
        return expected_distance(offset, std, 1.0, method=method)

    def drawn():
        draws = torch.randn(ENERGY.num_targets, ENERGY.num_rows, ENERGY.latent_size)
        return (offset + std * draws).norm(dim=-1).mean(0)

    torch.testing.assert_close(ours(), drawn(), rtol=2e-2, atol=0)
    torch.testing.assert_close(ours(), ours("quadrature"), rtol=1e-4, atol=0)
    rivals = {"mean of 100 draws": drawn, "ours, quadrature": lambda: ours("quadrature")}
    compare(benchmark, ours, rivals, shape=ENERGY)
