"""The layers for few rows in the interpreter, against the formula in float64."""

from functools import partial

import pytest
import torch
from helpers import assert_no_worse_than_plain, relative_error
from model_cases import Launches

from calm_kernels import linear_residual, norm_linear, norm_swiglu
from calm_kernels.norm_linear import kernels

EPS = 0.1
# rows, width, outputs: one block of each, part of one, more than one; widths of many steps
SIZES = [(1, 64, (16,)), (3, 7, (5, 17)), (17, 70, (16, 3, 33)), (33, 130, (1, 1, 1))]


def make_case(size, generator):
    rows, width, outputs = size
    shapes = [(rows, width), (width,), *((count, width) for count in outputs)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(case, dtype, backend):
    """All three layers on the same weights."""
    rows, factor, *weights = [value.to(dtype) for value in case]
    joined = norm_linear(rows, factor, weights, norm_eps=EPS, backend=backend)
    inner = norm_swiglu(rows, factor, weights[0], -weights[0], norm_eps=EPS, backend=backend)
    added = linear_residual(rows, weights[-1], joined[:, -len(weights[-1]) :], backend=backend)
    return [joined, inner, added]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_good_as_the_formula(size, generator):
    case = make_case(size, generator)
    plain, truth = (run(case, dtype, "reference") for dtype in (torch.float32, torch.float64))
    assert_no_worse_than_plain(run(case, torch.float32, "triton"), plain, truth)


@pytest.mark.parametrize("rows", [2, 18])
def test_bfloat16(rows, generator):
    """Settings of their own; the interpreter cuts off where a GPU rounds."""
    case = [value.bfloat16() for value in make_case((rows, 150, (40, 9)), generator)]
    truth = run(case, torch.float64, "reference")
    for actual, exact in zip(run(case, torch.bfloat16, "triton"), truth, strict=True):
        assert actual.dtype == torch.bfloat16 and relative_error(actual, exact) < 0.02


def test_one_launch_each_and_a_row_does_not_depend_on_the_others(generator, monkeypatch):
    launches = Launches(monkeypatch, kernels)
    case = make_case((19, 20, (6, 5)), generator)
    together = run(case, torch.float32, "triton")
    names = ["norm_linear_kernel", "norm_swiglu_kernel", "linear_residual_kernel"]
    assert launches.names == names
    alone = run([case[0][18:], *case[1:]], torch.float32, "triton")
    for value, others in zip(alone, together, strict=True):
        torch.testing.assert_close(value, others[18:], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_keeps_it_to_itself(bad, generator):
    case = make_case((4, 9, (5,)), generator)
    expected = run(case, torch.float32, "triton")
    case[0][2, 8] = bad
    for value, wanted in zip(run(case, torch.float32, "triton"), expected, strict=True):
        assert not value[2].isfinite().any()
        assert torch.equal(value[[0, 1, 3]], wanted[[0, 1, 3]])


def test_strides_empty_and_refused(generator):
    rows, factor, weight = (value.float() for value in make_case((4, 6, (5,)), generator))
    options = {"norm_eps": EPS, "backend": "triton"}
    strided = torch.stack([rows, rows], -1)[..., 0]
    expected = norm_linear(rows, factor, [weight], **options)
    assert torch.equal(norm_linear(strided, factor, [weight], **options), expected)
    assert norm_linear(rows[:0], factor, [weight], **options).shape == (0, 5)
    assert norm_swiglu(rows[:0], factor, weight, weight, **options).shape == (0, 5)
    assert linear_residual(rows[:0], weight, rows[:0, :5], backend="triton").shape == (0, 5)
    with pytest.raises(ValueError, match="takes up to 3 weights, got 4"):
        norm_linear(rows, factor, [weight] * 4, **options)
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        norm_linear(rows.half(), factor.half(), [weight.half()], **options)
    with pytest.raises(ValueError, match="takes contiguous weights"):
        linear_residual(rows, weight.T.contiguous().T, rows[:, :5], backend="triton")
    with pytest.raises(ValueError, match="has no gradient, and one is needed"):
        norm_swiglu(rows.requires_grad_(), factor, weight, weight, **options)
    taken = norm_swiglu(rows, factor, weight, weight, norm_eps=EPS)
    assert taken.requires_grad  # auto takes torch


@pytest.mark.parametrize("index", range(3), ids=["rows", "weight", "residual"])
def test_what_needs_a_gradient_gets_one(index, generator):
    """The kernel has none: left to itself the call runs in torch, and the kernel refuses."""
    inputs = [torch.randn(shape, generator=generator) for shape in [(2, 8), (4, 8), (2, 4)]]
    inputs[index].requires_grad_()
    linear_residual(*inputs).sum().backward()
    assert inputs[index].grad is not None
    with pytest.raises(ValueError, match="has no gradient"):
        linear_residual(*inputs, backend="triton")


@pytest.mark.parametrize("shapes", [(2**21, 1024, 16), (2**21, 16, 1024)], ids=str)
def test_more_elements_than_32_bits_count_run_in_torch(shapes):
    """Of the rows, and of the output."""
    num_rows, width, outputs = shapes
    rows, factor, weight = (
        torch.empty(shape, device="meta") for shape in [(num_rows, width), width, (outputs, width)]
    )
    residual = torch.empty(num_rows, outputs, device="meta")
    for run in (
        partial(norm_linear, rows, factor, [weight], norm_eps=EPS),
        partial(norm_swiglu, rows, factor, weight, weight, norm_eps=EPS),
        partial(linear_residual, rows, weight, residual),
    ):
        assert run().shape == (num_rows, outputs)
        with pytest.raises(ValueError, match="rows and outputs of less than 2\\^31 elements"):
            run(backend="triton")
