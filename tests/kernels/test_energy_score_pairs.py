"""Powers of distances by matmuls: as accurate as differences where points are near, far, many or
few, large or small.
"""

import pytest
import torch

from calm_kernels.energy_score import pairs

N, M, ROWS = 4, 40, 3


def make_points(width, generator):
    """x and y in double precision that float32 holds."""
    options = {"generator": generator, "dtype": torch.float32}
    points = (torch.randn(ROWS, count, width, **options) for count in (N, M))
    return [value.double() for value in points]


def assert_as_by_differences(x, y, exponent, weights=None):
    """With weights their gradient, too, of distances as near as those of the sum."""
    scale = torch.linspace(0.5, 1.5, ROWS)
    exact = None if weights is None else weights.double()
    expected = pairs._by_differences(x, y, exponent, scale.double(), exact, True, True)
    options = {"need_dx": True, "need_dy": True}
    actual = pairs.between(x.float(), y.float(), exponent, scale, weights, **options)
    assert (actual[3] is None) == (weights is None)
    # 8 eps for the distances, which are all positive; 40 for gradients, where directions cancel.
    for value, truth, tolerance in zip(actual, expected, (1e-6, 5e-6, 5e-6, 1e-6), strict=True):
        if value is not None:
            assert torch.isfinite(value).all()
            assert (value - truth).norm() <= tolerance * truth.norm()


@pytest.fixture
def matmuls(monkeypatch):
    """Whether each call of `_by_matmul` found few near pairs."""
    calls = []

    def watched(*arguments):
        terms = original(*arguments)
        calls.append(terms is not None)
        return terms

    original = pairs._by_matmul
    monkeypatch.setattr(pairs, "_by_matmul", watched)
    return calls


@pytest.mark.parametrize("exponent", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3, 0.2], ids=lambda value: f"apart-{value}")
@pytest.mark.parametrize("width", [64, 128])
def test_near_pairs(width, apart, exponent, matmuls, generator):
    """A sample on a target or next to it: its square in the matmul is rounding noise."""
    x, y = make_points(width, generator)
    step = torch.zeros(width, dtype=torch.float64)
    step[0] = apart
    y[0, 3], y[2, 0] = x[0, 1] + step, x[2, 2] - step
    y = y.float().double()
    assert_as_by_differences(x, y, exponent)
    assert matmuls == [True]


@pytest.mark.parametrize("width", [8, 64])
def test_weights(width, matmuls, generator):
    """Of near pairs and of far ones; padding of weight 0 takes no part in the centre."""
    x, y = (value + 100.0 for value in make_points(width, generator))
    y[0, 3] = x[0, 1]
    weights = torch.rand(ROWS, M, generator=generator)
    weights[1, 5:], y[1, 5:] = 0.0, 0.0
    assert_as_by_differences(x.float().double(), y.float().double(), 1.0, weights)
    assert matmuls == [True] * (width == 64)


def test_points_far_from_the_origin(matmuls, generator):
    """Matmuls are centred: an offset of a thousand spreads costs nothing more."""
    x, y = (value + 1000.0 for value in make_points(64, generator))
    assert_as_by_differences(x.float().double(), y.float().double(), 1.0)
    assert matmuls == [True]


@pytest.mark.parametrize("width", [64, 128])
def test_many_near_pairs(width, matmuls, generator):
    """All samples in one place, among half of the targets of one position."""
    x, y = make_points(width, generator)
    x[1] = 2.0
    y[1] = 2.0 + 1e-3 * y[1]
    y[1, ::2] *= -1
    y[1, 5] = x[1, 0]
    assert_as_by_differences(x, y.float().double(), 0.5)
    assert matmuls == [False]


@pytest.mark.parametrize("factor", [1e-18, 1e-12, 1e12], ids=str)
def test_squares_at_the_ends_of_float32(factor, matmuls, generator):
    x, y = ((factor * value).float().double() for value in make_points(64, generator))
    assert_as_by_differences(x, y, 1.0)
    assert matmuls == [factor != 1e-18]


def test_few_dimensions_take_by_differences(matmuls, generator):
    assert_as_by_differences(*make_points(8, generator), 1.0)
    assert matmuls == []


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_needed_gradients(need, generator):
    x, y = (value.float() for value in make_points(64, generator))
    y[0, 0] = x[0, 0]
    scale = torch.ones(ROWS)
    whole = pairs.between(x, y, 1.5, scale, need_dx=True, need_dy=True)
    part = pairs.between(x, y, 1.5, scale, need_dx=need[0], need_dy=need[1])
    assert torch.equal(part[0], whole[0])
    for wanted, value, expected in zip(need, part[1:3], whole[1:3], strict=True):
        assert torch.equal(value, expected) if wanted else value is None


def test_a_position_of_zeros_has_no_near_pairs(matmuls, generator):
    x, y = make_points(64, generator)
    x[1], y[1] = 0.0, 0.0
    assert_as_by_differences(x, y, 0.5)
    assert matmuls == [True]


def test_a_position_that_is_no_number_keeps_it_to_itself(generator):
    x, y = (value.float() for value in make_points(64, generator))
    scale = torch.ones(ROWS)
    options = {"need_dx": True, "need_dy": True}
    expected = pairs.between(x, y, 1.0, scale, **options)
    y[1, 2, 3] = float("nan")
    actual = pairs.between(x, y, 1.0, scale, **options)
    for value, wanted in zip(actual[:3], expected[:3], strict=True):
        assert not torch.isfinite(value[1]).all()
        torch.testing.assert_close(value[::2], wanted[::2])
