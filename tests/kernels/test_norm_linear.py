"""Linear layers with their norm, SwiGLU or residual: the portable backends."""

import math

import pytest
import torch
from helpers import assert_no_worse_than_plain

from calm_kernels import linear_residual, norm_linear, norm_swiglu

EPS = 0.1
SIZES = [(1, 1, (1,)), (3, 7, (5, 2)), (4, 16, (8, 3, 3, 9))]  # rows, width, outputs


def make_case(size, generator):
    """Rows, the norm's weight, a weight for each number of outputs."""
    rows, width, outputs = size
    shapes = [(rows, width), (width,), *((count, width) for count in outputs)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(case, dtype, backend):
    """All three layers, and the gradients of the sum of their tanh, whose rounding stays small."""
    rows, factor, *weights = inputs = [value.to(dtype).requires_grad_() for value in case]
    joined = norm_linear(rows, factor, weights, norm_eps=EPS, backend=backend)
    inner = norm_swiglu(rows, factor, weights[0], 2 * weights[0], norm_eps=EPS, backend=backend)
    added = linear_residual(rows, weights[-1], joined[:, -len(weights[-1]) :], backend=backend)
    results = [joined, inner, added]
    gradients = torch.autograd.grad(sum(value.tanh().sum() for value in results), inputs)
    return [*(value.detach() for value in results), *gradients]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_good_as_the_formula(size, dtype, backend, generator):
    case = make_case(size, generator)
    truth = run(case, torch.float64, "reference")
    assert_no_worse_than_plain(run(case, dtype, backend), run(case, dtype, "reference"), truth)


def test_literal_constants(backend):
    """x = (3, 4), so that √(mean x² + 3.5) = 4."""
    rows, factor = torch.tensor([[3.0, 4.0]]), torch.tensor([4.0, 2.0])  # x̂ = (3, 2)
    one, two = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    options = {"norm_eps": 3.5, "backend": backend}
    assert norm_linear(rows, factor, [one, two], **options).tolist() == [[3.0, 5.0, 4.0, -1.0]]
    found = norm_swiglu(rows, factor, one, two, **options)[0]
    wanted = [3 / (1 + math.exp(-3)) * 4, -5 / (1 + math.exp(-5))]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert linear_residual(rows, two, torch.tensor([[1.0, 1.0]]), backend=backend).tolist() == [
        [9.0, 2.0]
    ]


def test_the_norm_ignores_a_scale(backend, generator):
    rows, factor, weight = make_case((4, 6, (5,)), generator)
    options = {"norm_eps": 0.0, "backend": backend}
    expected = norm_linear(rows, factor, [weight], **options)
    torch.testing.assert_close(norm_linear(-7 * rows, factor, [weight], **options), -expected)


def test_any_leading_shape_and_none(backend, generator):
    rows, factor, weight = make_case((6, 4, (3,)), generator)
    options = {"norm_eps": EPS, "backend": backend}
    flat = norm_linear(rows, factor, [weight], **options)
    assert torch.equal(
        norm_linear(rows.view(2, 3, 4), factor, [weight], **options).view(6, 3), flat
    )
    assert norm_linear(rows[0], factor, [weight], **options).shape == (3,)
    assert norm_swiglu(rows[:0], factor, weight, weight, **options).shape == (0, 3)
    assert linear_residual(rows[:0], weight, rows[:0, :3], backend=backend).shape == (0, 3)


def test_a_residual_is_not_written(backend, generator):
    rows, _, weight = make_case((2, 4, (3,)), generator)
    residual = torch.zeros(2, 3, dtype=torch.float64)
    linear_residual(rows, weight, residual, backend=backend)
    assert not residual.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": [1.0]}, TypeError, "rows must be a tensor, got list"),
        ({"rows": torch.zeros(2, 0)}, ValueError, "rows must have at least one feature"),
        ({"norm_weight": torch.ones(3)}, ValueError, r"norm_weight must have shape \(4,\)"),
        ({"norm_weight": torch.ones(4).double()}, TypeError, "norm_weight must have dtype float32"),
        ({"weights": []}, ValueError, "weights must hold at least one weight, got none"),
        ({"weights": [torch.ones(2, 5)]}, ValueError, r"weights\[0\] must have shape \(2, 4\)"),
        ({"weights": [torch.ones(0, 4)]}, ValueError, r"weights\[0\] must have at least one row"),
    ],
)  # fmt: skip
def test_bad_input_of_norm_linear(change, error, message):
    arguments = {
        "rows": torch.zeros(2, 4), "norm_weight": torch.ones(4), "weights": [torch.ones(2, 4)],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        norm_linear(**arguments | change, norm_eps=EPS)


def test_bad_input_of_the_others():
    rows, factor, weight = torch.zeros(2, 4), torch.ones(4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"up must have shape \(3, 4\) \(the shape of gate\)"):
        norm_swiglu(rows, factor, weight, weight[:2], norm_eps=EPS)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 3\)"):
        linear_residual(rows, weight, rows)
    with pytest.raises(TypeError, match="residual must have dtype float32"):
        linear_residual(rows, weight, torch.zeros(2, 3).double())
