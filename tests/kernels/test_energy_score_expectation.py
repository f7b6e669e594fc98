"""E|v|^α of a Gaussian: closed forms, the float64 reference, and the guard of the series."""

import math

import pytest
import torch

from calm_kernels.energy_score import expected_distance
from calm_kernels.energy_score.reference import expected_distance_reference
from calm_kernels.energy_score.series import MAX_R2, MAX_SHARE, moments

EXPONENTS = (0.05, 0.5, 1.0, 1.5, 1.95)
WIDTHS = (1, 2, 3, 8, 32, 64, 128)


def central_moment(width, exponent):
    """E|v|^α of v ~ N(0, 1) in `width` dimensions: that of a chi variable."""
    log = math.lgamma((width + exponent) / 2) - math.lgamma(width / 2)
    return math.exp(log + exponent / 2 * math.log(2))


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-6)], ids=["fp64", "fp32"]
)
def test_chi(width, exponent, dtype, tolerance):
    offset, std = torch.zeros(width, dtype=dtype), torch.full((width,), 0.3, dtype=dtype)
    expected = 0.3**exponent * central_moment(width, exponent)
    assert expected_distance(offset, std, exponent).item() == pytest.approx(expected, rel=tolerance)
    truth = expected_distance_reference(offset.double(), std.double(), exponent)
    assert truth.item() == pytest.approx(0.3**exponent * central_moment(width, exponent), rel=1e-7)


@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0, 20.0])
def test_folded_normal(mean):
    """One dimension, exponent 1: E|v| in closed form."""
    density = math.sqrt(2 / math.pi) * math.exp(-(mean**2) / 2)
    expected = density + mean * math.erf(mean / math.sqrt(2))
    value = expected_distance(torch.tensor([mean]).double(), torch.ones(1).double())
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_by_monte_carlo(generator):
    options = {"generator": generator, "dtype": torch.float64}
    offset, std = torch.randn(6, 5, **options), torch.rand(6, 5, **options)
    draws = (offset + std * torch.randn(20_000, 6, 5, **options)).norm(dim=-1).sqrt()
    error = draws.mean(0) - expected_distance(offset, std, 0.5)
    assert (error.abs() < 4 * draws.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_order_of_exponents(exponent):
    """Just below exponent 2 the mean square; and (E|v|^α)^(1/α) grows with α (Lyapunov)."""
    offset, std = torch.tensor([0.4, -1.0, 2.0]).double(), torch.tensor([1.0, 0.1, 0.5]).double()
    square = (offset**2 + std**2).sum().item()
    assert expected_distance(offset, std, 1.9999).item() == pytest.approx(square, rel=1e-3)
    below, above = (expected_distance(offset, std, a).item() ** (1 / a) for a in (exponent, 1.9))
    assert below < above < square**0.5 + 1e-12


def hard_cases(width, generator):
    """Wide and narrow dimensions in every mixture, offsets along either, near and far."""
    options = {"generator": generator, "dtype": torch.float64}
    rows = []
    for index in range(150):
        wide = 1 + index % max(1, width // 2)
        std = torch.full(
            (width,), 10 ** -(2 * torch.rand((), **options).item()), dtype=torch.float64
        )
        std[:wide] = 1.0
        reach = 10 ** (1.5 * torch.rand((), **options).item() - 1)
        offset = reach * torch.randn(width, **options) * (std if index % 2 else 1.0)
        if index % 5 == 0:
            offset[wide:] = 0.0
        if index % 7 == 0:
            offset[:wide] = 0.0
        rows.append((offset, std))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def errors(offset, std, exponent, dtype, **options):
    """Worst relative error of value and offset gradient, and the rows' guard quantities."""
    inputs = [value.to(dtype).requires_grad_() for value in (offset, std)]
    truth_inputs = [value.detach().double().requires_grad_() for value in inputs]
    truth = expected_distance_reference(*truth_inputs, exponent)
    value = expected_distance(*inputs, exponent, **options)
    (true_gradient,) = torch.autograd.grad(truth.sum(), truth_inputs[0])
    (gradient,) = torch.autograd.grad(value.sum(), inputs[0])
    scale = true_gradient.norm(dim=-1)
    scale = torch.where(scale > 1e-9 * scale.max(), scale, math.inf)
    gradient_error = (gradient.double() - true_gradient).norm(dim=-1) / scale
    return ((value.double() - truth) / truth).abs().detach(), gradient_error


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("width", WIDTHS)
class TestAccuracy:
    def test_float64(self, width, exponent, generator):
        value, gradient = errors(*hard_cases(width, generator), exponent, torch.float64)
        assert value.max() < 1e-10
        assert gradient.max() < 1e-10

    def test_float32(self, width, exponent, generator):
        value, gradient = errors(*hard_cases(width, generator), exponent, torch.float32)
        assert value.max() < 3e-6
        assert gradient.median() < 2e-6
        assert gradient.max() < 5e-5

    def test_series_within_its_guard(self, width, exponent, generator):
        """The truncation error alone: the series in float64."""
        offset, std = hard_cases(width, generator)
        found = moments(offset.square()[:, None], std.square())
        is_within = ~found.is_past_guard()
        value, gradient = errors(offset, std, exponent, torch.float64, method="series")
        if is_within.any():
            assert value[is_within].max() < 2e-6
            assert gradient[is_within].max() < 5e-5
        if exponent == 1.0 and width >= 8:
            assert value[~is_within].max() > 1e-5  # and the guard is needed


def test_guard_bounds_share_as_well_as_r2():
    """A wide dimension seen from afar: r2 is small, and the series wrong in the fifth digit."""
    width = 64
    offset, std = torch.zeros(1, width).double(), torch.full((1, width), 0.02).double()
    offset[0, -1], std[0, 0] = 2.8, 1.0
    found = moments(offset.square()[:, None], std.square())
    assert found.r2.item() < MAX_R2 / 2
    assert found.share.item() > MAX_SHARE
    value, _ = errors(offset, std, 1.0, torch.float64, method="series")
    assert value.item() > 1e-5
    value, _ = errors(offset, std, 1.0, torch.float32)
    assert value.item() < 5e-6


def test_methods_agree_where_both_hold(generator):
    offset = torch.randn(20, 128, generator=generator)
    std = 0.1 + 0.5 * torch.rand(20, 128, generator=generator)
    series, quadrature = (
        expected_distance(offset, std, method=method) for method in ("series", "quadrature")
    )
    torch.testing.assert_close(series, quadrature, rtol=2e-6, atol=0)
    assert torch.equal(expected_distance(offset, std), series)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 3, 5)], ids=str)
def test_shapes(shape, generator):
    offset, std = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    value = expected_distance(offset, std, 1.2)
    assert value.shape == shape[:-1]
    value.sum().backward()
    assert offset.grad.shape == std.grad.shape == shape
    torch.testing.assert_close(expected_distance(offset, -std, 1.2), value)
