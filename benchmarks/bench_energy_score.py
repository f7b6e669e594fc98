"""The energy score with gradients against the published formula, torch.cdist and scoringrules."""

import shutil

import pytest
import scoringrules
import torch

from benchmarks.measure import Requirement, compare
from benchmarks.shapes import ENERGY
from calm_kernels import energy_score, gaussian_energy_score

REFERENCE, CDIST = "published formula, M=100", "torch.cdist, M=100"
REQUIREMENTS = (
    Requirement(REFERENCE, min_speedup=40.0, max_memory_share=0.1),
    Requirement(CDIST, min_speedup=4.0),
)
NUM_PAIRS = ENERGY.num_samples * (ENERGY.num_samples - 1)


@pytest.fixture
def patches():
    """Samples near a posterior as wide as a trained autoencoder's, in patch-major memory."""
    rows, size = ENERGY.num_rows, ENERGY.latent_size
    mean = torch.randn(rows, size)
    log_std = torch.full((rows, size), 0.3).log() + 0.1 * torch.randn(rows, size)
    samples = mean[:, None] + 0.5 * torch.randn(rows, ENERGY.num_samples, size)
    return samples.transpose(0, 1).requires_grad_(), mean, log_std


def draw_noise():
    return torch.randn(ENERGY.num_targets, ENERGY.num_rows, ENERGY.latent_size)


def draw_targets(mean, log_std):
    return mean + log_std.exp() * draw_noise()


def gradient_of(score, samples, retain_graph=False):
    (gradient,) = torch.autograd.grad(score.mean(), samples, retain_graph=retain_graph)
    return gradient


def published(samples, mean, log_std, noise):
    """The published computation; its noise is drawn anew in every step."""
    return gaussian_energy_score(samples, mean, log_std, target_noise=noise, backend="reference")


def cdist_score(samples, targets):
    """The strongest plain PyTorch rival: two calls of torch.cdist, patches as the batch."""
    draws, points = samples.transpose(0, 1), targets.transpose(0, 1)
    exact = "donot_use_mm_for_euclid_dist"
    fidelity = torch.cdist(draws, points).mean((1, 2))
    pairs = torch.cdist(draws, draws, compute_mode=exact).sum((1, 2)) / NUM_PAIRS
    return pairs - 2 * fidelity


def scoringrules_score(samples, targets):
    """scoringrules' fair estimator for every target; half of ours, and better when lower."""
    draws = samples.transpose(0, 1).expand(len(targets), -1, -1, -1)
    score = scoringrules.es_ensemble(
        targets, draws, m_axis=-2, v_axis=-1, estimator="fair", backend="torch"
    )
    return -2 * score.mean(0)


def assert_same_score(ours, rival, samples):
    torch.testing.assert_close(rival, ours, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        gradient_of(rival, samples),
        gradient_of(ours, samples, retain_graph=True),  # compared with more than one rival
        rtol=2e-2,
        atol=1e-6,
    )


@pytest.mark.benchmark(group="gaussian_energy_score analytic, fwd+bwd")
def bench_analytic_forward_backward(benchmark, patches):
    samples, mean, log_std = patches
    noise = draw_noise()
    targets = mean + log_std.exp() * noise
    sampled = gaussian_energy_score(samples, mean, log_std, target_noise=noise)
    assert_same_score(sampled, published(samples, mean, log_std, noise), samples)
    assert_same_score(sampled, cdist_score(samples, targets), samples)
    analytic = gaussian_energy_score(samples, mean, log_std)
    gap = (analytic - sampled).detach()
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5

    compare(
        benchmark,
        lambda: gradient_of(gaussian_energy_score(samples, mean, log_std), samples),
        {
            REFERENCE: lambda: gradient_of(
                published(samples, mean, log_std, draw_noise()), samples
            ),
            CDIST: lambda: gradient_of(cdist_score(samples, draw_targets(mean, log_std)), samples),
            "ours, antithetic, M=2": lambda: gradient_of(
                gaussian_energy_score(samples, mean, log_std, targets="antithetic", num_targets=2),
                samples,
            ),
            "ours, sampled, M=100": lambda: gradient_of(
                gaussian_energy_score(samples, mean, log_std, targets="sample"), samples
            ),
        },
        shape=ENERGY,
        requirements=REQUIREMENTS,
    )


@pytest.mark.benchmark(group="gaussian_energy_score analytic, fwd")
def bench_analytic_forward(benchmark, patches):
    samples, mean, log_std = (tensor.detach() for tensor in patches)
    noise = draw_noise()
    torch.testing.assert_close(
        published(samples, mean, log_std, noise),
        gaussian_energy_score(samples, mean, log_std, target_noise=noise),
        rtol=1e-3,
        atol=1e-4,
    )
    compare(
        benchmark,
        lambda: gaussian_energy_score(samples, mean, log_std),
        {REFERENCE: lambda: published(samples, mean, log_std, draw_noise())},
        shape=ENERGY,
    )


@pytest.mark.benchmark(group="energy_score, targets given, fwd+bwd")
def bench_given_targets(benchmark, patches):
    samples, mean, log_std = patches
    targets = draw_targets(mean, log_std)
    assert_same_score(energy_score(samples, targets), scoringrules_score(samples, targets), samples)
    compare(
        benchmark,
        lambda: gradient_of(energy_score(samples, targets), samples),
        {
            "published formula": lambda: gradient_of(
                energy_score(samples, targets, backend="reference"), samples
            ),
            "torch.cdist": lambda: gradient_of(cdist_score(samples, targets), samples),
            "scoringrules, fair": lambda: gradient_of(
                scoringrules_score(samples, targets), samples
            ),
        },
        shape=ENERGY,
        rounds=3,
    )


@pytest.mark.benchmark(group="gaussian_energy_score against torch.compile, fwd+bwd")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def bench_against_compiled_formula(benchmark, patches):
    samples, mean, log_std = patches

    @torch.compile
    def compiled(samples, mean, log_std, noise):
        return published(samples, mean, log_std, noise)

    noise = draw_noise()
    assert_same_score(
        gaussian_energy_score(samples, mean, log_std, target_noise=noise),
        compiled(samples, mean, log_std, noise),
        samples,
    )
    compare(
        benchmark,
        lambda: gradient_of(gaussian_energy_score(samples, mean, log_std), samples),
        {
            "published formula, torch.compile": lambda: gradient_of(
                compiled(samples, mean, log_std, draw_noise()), samples
            )
        },
        shape=ENERGY,
        rounds=3,
    )
