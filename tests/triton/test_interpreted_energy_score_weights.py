"""Weights of targets in the kernels, against the float64 reference, with every gradient."""

import pytest
import torch
from energy_cases import EXPONENTS, assert_as_reference, differentiate

from calm_kernels import energy_score, gaussian_energy_score

FP32 = (5e-6, 2e-5)  # see test_interpreted_energy_score.py
kinds = pytest.mark.parametrize("kind", ["given", "mixture"])


def make_inputs(kind, n, m, width, generator):
    """Samples, targets (or mean and log_std) and weights: signed, zero and huge ones among them."""
    points = [torch.randn(count, 2, width, generator=generator) for count in (n, m)]
    if kind == "mixture":
        points.append(0.3 * torch.randn(m, 2, width, generator=generator))
    weights = torch.randn(m, 2, generator=generator) + 0.1
    weights[0, 0], weights[-1, 1] = 0.0, 1e5
    return [*points, weights]


def run(inputs, backend, *, dtype=torch.float32, weights_too=True, **options):
    """Score and gradients; those of the weights come last."""
    *points, weights = (value.detach().to(dtype) for value in inputs)
    leaves = [value.requires_grad_() for value in points]
    if weights_too:
        leaves.append(weights.requires_grad_())
    score = energy_score if len(points) == 2 else gaussian_energy_score
    return differentiate(score(*points, target_weights=weights, backend=backend, **options), leaves)


@pytest.mark.parametrize(
    ("n", "m", "width", "exponent"),
    [(2, 2, 1, EXPONENTS[0]), (11, 3, 12, EXPONENTS[1]), (3, 5, 70, EXPONENTS[2])],
)
@kinds
def test_every_gradient(kind, n, m, width, exponent, generator):
    """One block of samples and more than one; the launch is one either way."""
    inputs = make_inputs(kind, n, m, width, generator)
    options = {"exponent": exponent, "weight": torch.tensor([2.0, -0.5])}
    expected = run(inputs, "reference", dtype=torch.float64, **options)
    assert_as_reference(run(inputs, "triton", **options), expected, torch.float32, FP32)


@kinds
def test_without_a_gradient_of_the_weights(kind, generator):
    """Then a target of weight 0 is not read, and may hold anything."""
    inputs = make_inputs(kind, 3, 4, 8, generator)
    expected = run(inputs, "triton")
    for value in inputs[1:-1]:
        value[0, 0] = float("nan")
    actual = run(inputs, "triton", weights_too=False)
    for value, wanted in zip(actual, expected[:-1], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    assert not any(gradient[0, 0].any() for gradient in actual[2:])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
@kinds
def test_nan_and_masked_positions(kind, generator):
    inputs = make_inputs(kind, 3, 4, 8, generator)
    expected = run(inputs, "triton")
    for value in inputs:
        value[1, 0] = float("nan")
    score, *_ = run(inputs, "triton")
    assert score[0].isnan() and score[1] == expected[0][1]
    outputs = run(inputs, "triton", weight=torch.tensor([0.0, 1.0]))
    assert outputs[0][0] == 0 and not any(gradient[:, 0].any() for gradient in outputs[1:])
    for value, wanted in zip(outputs[1:], expected[1:], strict=True):
        assert torch.equal(value[:, 1], wanted[:, 1])


def test_one_gaussian_of_weight_one_is_the_plain_call(generator):
    samples, mean, log_std, _ = make_inputs("mixture", 3, 1, 8, generator)
    plain, terms = gaussian_energy_score(
        samples, mean[0], log_std[0], return_diagnostics=True, backend="triton"
    )
    one, same = gaussian_energy_score(
        samples, mean, log_std, target_weights=torch.ones(1, 2), return_diagnostics=True,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(one, plain)
    assert all(map(torch.equal, terms, same))


@kinds
def test_any_strides_and_dtypes(kind, generator):
    inputs = make_inputs(kind, 3, 4, 8, generator)
    expected = run(inputs, "triton")
    strided = [torch.stack([v, -v], -1)[..., 0] for v in inputs[:-1]]
    strided.append(inputs[-1].T.contiguous().T)
    leaves = [value.requires_grad_() for value in strided]
    score = energy_score if kind == "given" else gaussian_energy_score
    actual = differentiate(score(*leaves[:-1], target_weights=leaves[-1], backend="triton"), leaves)
    assert all(map(torch.equal, actual, expected))
    weights = inputs[-1].double().requires_grad_()
    half = [value.detach().bfloat16().requires_grad_() for value in inputs[:-1]]
    found = differentiate(
        score(*half, target_weights=weights, backend="triton"), [half[0], weights]
    )
    assert found[0].dtype == torch.float32 and found[2].dtype == torch.float64


def test_diagnostics_of_a_mixture(generator):
    samples, mean, log_std, weights = make_inputs("mixture", 3, 4, 8, generator)
    options = {"target_weights": weights, "return_diagnostics": True}
    options["weight"] = torch.tensor([1.0, 0.0])
    score, terms = gaussian_energy_score(samples, mean, log_std, backend="triton", **options)
    _, expected = gaussian_energy_score(samples, mean, log_std, backend="reference", **options)
    torch.testing.assert_close(score, terms.diversity - terms.fidelity)
    for actual, wanted in zip(terms, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_an_empty_batch():
    samples, weights = torch.zeros(3, 0, 8), torch.zeros(2, 0, requires_grad=True)
    score = energy_score(samples, torch.zeros(2, 0, 8), target_weights=weights, backend="triton")
    assert torch.autograd.grad(score.sum(), weights)[0].shape == (2, 0)
