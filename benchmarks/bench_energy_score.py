"""The energy score with gradients against the reference backend, torch.cdist and scoringrules."""

import shutil
from functools import partial

import pytest
import scoringrules
import torch

from benchmarks.measure import Baseline, Requirement, compare
from benchmarks.shapes import ENERGY
from calm_kernels import energy_score, gaussian_energy_score

REFERENCE, CDIST = "reference backend, M=100", "torch.cdist, M=100"
REQUIREMENTS = (
    Requirement(REFERENCE, min_speedup=40.0, max_memory_share=0.1),
    Requirement(CDIST, min_speedup=4.0),
)
UNWEIGHTED, ONE = "without weights", "one Gaussian"
WEIGHTED = (Requirement(UNWEIGHTED, min_speedup=1 / 1.15),)
NUM_GAUSSIANS = 4
NUM_PAIRS = ENERGY.num_samples * (ENERGY.num_samples - 1)


@pytest.fixture
def chunks():
    """Samples near a posterior as wide as a trained autoencoder's, in chunk-major memory."""
    rows, size = ENERGY.num_rows, ENERGY.latent_size
    mean = torch.randn(rows, size)
    log_std = torch.full((rows, size), 0.3).log() + 0.1 * torch.randn(rows, size)
    samples = mean[:, None] + 0.5 * torch.randn(rows, ENERGY.num_samples, size)
    return samples.transpose(0, 1).requires_grad_(), mean, log_std


def draw_noise():
    return torch.randn(ENERGY.num_targets, ENERGY.num_rows, ENERGY.latent_size)


def draw_targets(mean, log_std):
    return mean + log_std.exp() * draw_noise()


def gradient_of(score, samples):
    (gradient,) = torch.autograd.grad(score.mean(), samples)
    return gradient


def reference(samples, mean, log_std, noise):
    """The published formula; its noise is drawn in every step."""
    return gaussian_energy_score(samples, mean, log_std, target_noise=noise, backend="reference")


def cdist_score(samples, targets):
    """The fastest plain PyTorch: two calls of torch.cdist, chunks as the batch."""
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


def assert_same_score(ours, other, samples):
    torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        gradient_of(other, samples), gradient_of(ours, samples), rtol=2e-2, atol=1e-6
    )


def assert_same_mean(score, samples, mean, log_std):
    """A score with other targets differs from the analytic one by chance alone."""
    gap = (gaussian_energy_score(samples, mean, log_std) - score).detach()
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5


@pytest.mark.benchmark(group="gaussian_energy_score analytic, fwd+bwd")
def bench_analytic_forward_backward(benchmark, chunks):
    samples, mean, log_std = chunks

    def ours(**options):
        return gaussian_energy_score(samples, mean, log_std, **options)

    def antithetic():
        return ours(targets="antithetic", num_targets=2)

    def sampled():
        return ours(targets="sample")

    def baseline(score, check):
        return Baseline(lambda: gradient_of(score(), samples), check)

    def same_as_reference():
        noise = draw_noise()
        given = ours(target_noise=noise)
        assert_same_score(given, reference(samples, mean, log_std, noise), samples)
        assert_same_mean(given, samples, mean, log_std)

    def same_as_cdist():
        noise = draw_noise()
        targets = mean + log_std.exp() * noise
        assert_same_score(ours(target_noise=noise), cdist_score(samples, targets), samples)

    compare(
        benchmark,
        lambda: gradient_of(ours(), samples),
        {
            REFERENCE: baseline(
                lambda: reference(samples, mean, log_std, draw_noise()), same_as_reference
            ),
            CDIST: baseline(
                lambda: cdist_score(samples, draw_targets(mean, log_std)), same_as_cdist
            ),
            "ours, antithetic, M=2": baseline(
                antithetic, lambda: assert_same_mean(antithetic(), samples, mean, log_std)
            ),
            "ours, sampled, M=100": baseline(
                sampled, lambda: assert_same_mean(sampled(), samples, mean, log_std)
            ),
        },
        shape=ENERGY,
        requirements=REQUIREMENTS,
    )


@pytest.mark.benchmark(group="gaussian_energy_score analytic, fwd")
def bench_analytic_forward(benchmark, chunks):
    samples, mean, log_std = (tensor.detach() for tensor in chunks)

    def same_score():
        noise = draw_noise()
        expected = reference(samples, mean, log_std, noise)
        actual = gaussian_energy_score(samples, mean, log_std, target_noise=noise)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert_same_mean(expected, samples, mean, log_std)

    compare(
        benchmark,
        lambda: gaussian_energy_score(samples, mean, log_std),
        {REFERENCE: Baseline(lambda: reference(samples, mean, log_std, draw_noise()), same_score)},
        shape=ENERGY,
    )


@pytest.mark.benchmark(group="energy_score, targets given, fwd+bwd")
def bench_given_targets(benchmark, chunks):
    samples, mean, log_std = chunks
    targets = draw_targets(mean, log_std)

    def baseline(score):
        def same_score():
            assert_same_score(energy_score(samples, targets), score(samples, targets), samples)

        return Baseline(lambda: gradient_of(score(samples, targets), samples), same_score)

    compare(
        benchmark,
        lambda: gradient_of(energy_score(samples, targets), samples),
        {
            "reference backend": baseline(partial(energy_score, backend="reference")),
            "torch.cdist": baseline(cdist_score),
            "scoringrules, fair": baseline(scoringrules_score),
        },
        shape=ENERGY,
        rounds=3,
    )


@pytest.mark.benchmark(group="energy_score, weighted targets, fwd+bwd")
def bench_weighted_targets(benchmark, chunks):
    samples, mean, log_std = chunks
    targets = draw_targets(mean, log_std)
    weights = torch.softmax(torch.randn(targets.shape[:-1]), 0)

    def weighted(of=weights, **options):
        return energy_score(samples, targets, target_weights=of, **options)

    def same_with_equal_weights():
        equal = torch.full_like(weights, 1 / len(weights))
        assert_same_score(weighted(equal), energy_score(samples, targets), samples)

    def same_as_reference():
        assert_same_score(weighted(), weighted(backend="reference"), samples)

    compare(
        benchmark,
        lambda: gradient_of(weighted(), samples),
        {
            UNWEIGHTED: Baseline(
                lambda: gradient_of(energy_score(samples, targets), samples),
                same_with_equal_weights,
            ),
            "reference backend": Baseline(
                lambda: gradient_of(weighted(backend="reference"), samples), same_as_reference
            ),
        },
        shape=ENERGY,
        requirements=WEIGHTED,
    )


@pytest.mark.benchmark(group="gaussian_energy_score, mixture of 4, fwd+bwd")
def bench_mixture(benchmark, chunks):
    samples, mean, log_std = chunks
    means = mean + 0.1 * torch.randn(NUM_GAUSSIANS, *mean.shape)
    spreads = log_std.expand_as(means).contiguous()
    weights = torch.softmax(torch.randn(means.shape[:-1]), 0)

    def one(g=0):
        return gaussian_energy_score(samples, means[g], spreads[g])

    def mixture():
        return gaussian_energy_score(samples, means, spreads, target_weights=weights)

    def each():
        """Weights sum to 1: the score of the mixture is the weighted score of its parts."""
        return sum(weights[g] * one(g) for g in range(NUM_GAUSSIANS))

    def same():
        assert_same_score(mixture(), each(), samples)

    compare(
        benchmark,
        lambda: gradient_of(mixture(), samples),
        {
            ONE: Baseline(lambda: gradient_of(one(), samples), same),
            "four scores": Baseline(lambda: gradient_of(each(), samples), same),
        },
        shape=ENERGY,
        requirements=(Requirement(ONE, min_speedup=1 / NUM_GAUSSIANS),),
    )


@pytest.mark.benchmark(group="gaussian_energy_score against torch.compile, fwd+bwd")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def bench_against_compiled_formula(benchmark, chunks):
    samples, mean, log_std = chunks

    @torch.compile
    def compiled(samples, mean, log_std, noise):
        return reference(samples, mean, log_std, noise)

    def same_score():
        noise = draw_noise()
        expected = gaussian_energy_score(samples, mean, log_std, target_noise=noise)
        assert_same_score(expected, compiled(samples, mean, log_std, noise), samples)

    def run():
        return gradient_of(compiled(samples, mean, log_std, draw_noise()), samples)

    compare(
        benchmark,
        lambda: gradient_of(gaussian_energy_score(samples, mean, log_std), samples),
        {"reference backend, torch.compile": Baseline(run, same_score)},
        shape=ENERGY,
        rounds=3,
    )
