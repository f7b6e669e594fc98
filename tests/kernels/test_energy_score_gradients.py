"""Gradients of the energy score: gradcheck, and finite where the published code divides by zero."""

import pytest
import torch
from energy_cases import EXPONENTS, Case, make_case, score_and_gradients

from calm_kernels.energy_score import energy_score, expected_distance, gaussian_energy_score

EXTREMES = (0.05, 0.3, 0.7, 1.0, 1.3, 1.95)
gradcheck_options = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("targets", ["analytic", "antithetic", "sample"])
def test_gradcheck_gaussian(targets, exponent, backend, generator):
    case = make_case(3, (2,), 8, generator).to(torch.float64, True)

    def score(*inputs):
        options = {"targets": targets, "num_targets": 4, "seed": 0}
        return gaussian_energy_score(*inputs, exponent=exponent, backend=backend, **options)

    assert torch.autograd.gradcheck(score, tuple(case), **gradcheck_options)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_gradcheck_given_targets(exponent, backend, generator):
    points = [
        torch.randn(n, 2, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (3, 4)
    ]

    def score(samples, targets):
        weight = torch.tensor([0.5, 2.0])
        return energy_score(samples, targets, exponent=exponent, weight=weight, backend=backend)

    assert torch.autograd.gradcheck(score, points, **gradcheck_options)


@pytest.mark.parametrize("method", ["auto", "series", "quadrature"])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_gradcheck_expected_distance(exponent, method, generator):
    offset, std = (
        torch.randn(2, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(
        lambda *inputs: expected_distance(*inputs, exponent, method=method),
        (offset, std),
        **gradcheck_options,
    )


@pytest.mark.parametrize("targets", ["analytic", "sample"])
def test_differentiable_once(targets, backend, generator):
    case = make_case(3, (2,), 8, generator).to(torch.float64, True)
    score = gaussian_energy_score(*case, targets=targets, seed=0, backend=backend).sum()
    with pytest.raises(RuntimeError, match="the energy score is differentiable once"):
        torch.autograd.grad(score, case.samples, create_graph=True)


def test_differentiable_once_in_given_targets(backend, generator):
    points = [torch.randn(n, 2, 8, generator=generator).requires_grad_() for n in (3, 4)]
    score = energy_score(*points, backend=backend).sum()
    with pytest.raises(RuntimeError, match="the energy score is differentiable once"):
        torch.autograd.grad(score, points, create_graph=True)


def test_backward_twice_over_one_graph(backend, generator):
    """What is stored for backward survives it."""
    case = make_case(3, (2,), 64, generator).to(torch.float32, True)
    score = gaussian_energy_score(*case, backend=backend).sum()
    first = torch.autograd.grad(score, case, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(score, case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("targets", ["analytic", "sample"])
@pytest.mark.parametrize("exponent", EXTREMES)
@pytest.mark.parametrize("width", [1, 5, 64])
class TestDegenerate:
    """Nothing is NaN or infinite, and what is zero by symmetry is zero."""

    def check(self, case, backend, dtype, **options):
        outputs = score_and_gradients(case.to(dtype, True), backend, num_targets=4, **options)
        assert all(torch.isfinite(value).all() for value in outputs)
        return outputs

    def test_all_samples_coincide(self, width, exponent, targets, dtype, backend, generator):
        """The first training step of a head whose last layer is zero."""
        case = make_case(4, (3,), width, generator)
        case = Case(torch.zeros_like(case.samples), case.mean, case.log_std)
        options = {"exponent": exponent, "targets": targets, "seed": 0}
        _, dsamples, _, _ = self.check(case, backend, dtype, **options)
        torch.testing.assert_close(dsamples, dsamples[:1].expand_as(dsamples))
        _, terms = gaussian_energy_score(*case.to(dtype), return_diagnostics=True, **options)
        assert (terms.diversity == 0).all()

    def test_two_of_the_samples_coincide(self, width, exponent, targets, dtype, backend, generator):
        case = make_case(4, (3,), width, generator)
        case.samples[1] = case.samples[0]
        options = {"exponent": exponent, "targets": targets, "seed": 0}
        _, dsamples, _, _ = self.check(case, backend, dtype, **options)
        torch.testing.assert_close(dsamples[0], dsamples[1])

    def test_samples_on_the_targets(self, width, exponent, targets, dtype, backend, generator):
        case = make_case(4, (3,), width, generator)
        noise = torch.zeros(4, 3, width, dtype=dtype)
        case = Case(case.mean.expand_as(case.samples).clone(), case.mean, case.log_std)
        options = {"exponent": exponent, "target_noise": noise}
        score, dsamples, _, _ = self.check(case, backend, dtype, **options)
        assert (score == 0).all()
        assert (dsamples == 0).all()

    def test_sample_at_the_mean(self, width, exponent, targets, dtype, backend, generator):
        """A Gaussian about x pulls x nowhere."""
        case = make_case(2, (3,), width, generator)
        case = Case(case.mean.expand_as(case.samples).clone(), case.mean, case.log_std)
        options = {"exponent": exponent, "targets": targets, "seed": 0}
        _, dsamples, _, _ = self.check(case, backend, dtype, **options)
        if targets == "analytic":
            assert (dsamples == 0).all()

    def test_point_target(self, width, exponent, targets, dtype, backend, generator):
        """No variance: E|x - y|^α is |x - mean|^α, and nothing where x is there too."""
        case = make_case(3, (4,), width, generator).to(dtype)
        case.samples[:, 0] = case.mean[0]
        log_std = torch.full_like(case.log_std, -1000.0)
        options = {"exponent": exponent, "targets": targets, "seed": 0}
        case = Case(case.samples, case.mean, log_std)
        score, _, _, _ = self.check(case, backend, dtype, **options)
        # Twice the distance to the target and the distance between samples, about as large, cancel:
        # the score is exact to one rounding of the larger, whichever library takes the roots.
        longest = float((case.samples - case.mean).norm(dim=-1).max() ** exponent)
        rounding = torch.finfo(dtype).eps * 2 * longest
        point = energy_score(case.samples, case.mean[None], exponent=exponent, backend="reference")
        torch.testing.assert_close(score, point, rtol=3e-6, atol=max(1e-6, rounding))
        assert score[0] == 0


@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("exponent", [0.05, 1.0, 1.5])
@pytest.mark.parametrize("targets", ["analytic", "sample"])
@pytest.mark.parametrize("width", [2, 64])
def test_any_scale(width, targets, exponent, factor, backend, generator):
    """score(cx) = |c|^α score(x), also where squares of squares leave the range of float32."""
    case = make_case(3, (4,), width, generator).to(torch.float64)
    options = {"exponent": exponent, "targets": targets, "num_targets": 4, "seed": 0}
    expected = score_and_gradients(case.to(torch.float64, True), "reference", **options)
    scaled = Case(
        case.samples * factor, case.mean * factor, case.log_std + torch.tensor(factor).log()
    )
    actual = score_and_gradients(scaled.to(torch.float32, True), backend, **options)
    powers = (exponent, exponent - 1, exponent - 1, exponent)
    for value, truth, power in zip(actual, expected, powers, strict=True):
        assert torch.isfinite(value).all()
        error = (value.double() / factor**power - truth).norm() / truth.norm()
        assert error < 1e-4
