"""Layers for few rows at full size: parity with the library, and bits that do not change."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import linear_residual, norm_linear, norm_swiglu

EPS = 1e-6
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-5}  # two roundings in bf16


def make_inputs(rows, width, inner, dtype):
    torch.manual_seed(rows)
    options = {"device": "cuda"}
    weights = [width**-0.5 * torch.randn(inner, width, **options) for _ in range(3)]
    values = (torch.randn(rows, width, **options), torch.rand(width, **options), *weights)
    return [value.to(dtype) for value in values]


def run(inputs, backend):
    rows, factor, first, second, third = inputs
    joined = norm_linear(rows, factor, [first, second, third], norm_eps=EPS, backend=backend)
    inner = norm_swiglu(rows, factor, first, second, norm_eps=EPS, backend=backend)
    added = linear_residual(rows, third, joined[:, : len(third)], backend=backend)
    return [joined, inner, added]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 64])
@pytest.mark.parametrize("size", [(1024, 2752), (768, 2048), (2752, 1024), (1000, 1501)])
def test_parity_at_full_size(rows, size, dtype):
    inputs = make_inputs(rows, *size, dtype)
    actual = run(inputs, "triton")
    truth = run([value.double() for value in inputs], "reference")
    for value, exact in zip(actual, truth, strict=True):
        assert torch.isfinite(value).all() and relative_error(value, exact) < TOLERANCE[dtype]
    for value, again in zip(actual, run(inputs, "triton"), strict=True):
        assert torch.equal(value, again)


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    """Within the same block of rows to the bit."""
    inputs = make_inputs(16, 1024, 512, torch.bfloat16)
    together = run(inputs, "triton")
    for value, others in zip(run([inputs[0][5:6], *inputs[1:]], "triton"), together, strict=True):
        assert torch.equal(value, others[5:6])
