"""The energy score against the float64 reference, the published code, and an outside library."""

from itertools import product
from pathlib import Path

import pytest
import scoringrules
import torch
from energy_cases import (
    EXPONENTS,
    TOLERANCES,
    Case,
    assert_as_reference,
    differentiate,
    make_case,
    score_and_gradients,
)
from safetensors.torch import load_file

from calm_kernels.energy_score import energy_score, gaussian_energy_score

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
# Least, odd and usual counts; one dimension, few, one past a power of two, the sizes in use.
SAMPLES, TARGETS, WIDTHS = (2, 3, 8), (1, 3, 100), (1, 2, 8, 33, 64, 128)
SHAPES = list(product(SAMPLES, TARGETS, WIDTHS))
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])


def exponent_of(*sizes):
    """Another exponent from shape to shape."""
    return EXPONENTS[sum(sizes) % len(EXPONENTS)]


@dtypes
@pytest.mark.parametrize(("n", "m", "width"), SHAPES, ids=[f"N{n}-M{m}-L{w}" for n, m, w in SHAPES])
def test_given_targets(n, m, width, dtype, backend, generator):
    exponent = exponent_of(n, m, width)
    points = [
        torch.randn(count, 2, 2, width, generator=generator, dtype=torch.float64).to(dtype)
        for count in (n, m)
    ]

    def run(values, name):
        inputs = [value.requires_grad_() for value in values]
        return differentiate(energy_score(*inputs, exponent=exponent, backend=name), inputs)

    expected = run([value.double() for value in points], "reference")
    actual = run(points, backend)
    assert actual[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert [value.dtype for value in actual[1:]] == [dtype, dtype]
    assert_as_reference(actual, expected, dtype)


@dtypes
@pytest.mark.parametrize("targets", ["analytic", "antithetic", "sample"])
@pytest.mark.parametrize(("n", "width"), list(product(SAMPLES, WIDTHS)))
def test_gaussian_targets(n, width, targets, dtype, backend, generator):
    case = make_case(n, (3, 2), width, generator).to(dtype)
    options = {"exponent": exponent_of(n, width), "targets": targets, "num_targets": 6, "seed": 7}
    expected = score_and_gradients(case.to(torch.float64, True), "reference", **options)
    actual = score_and_gradients(case.to(dtype, True), backend, **options)
    assert actual[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_as_reference(actual, expected, dtype)


@pytest.mark.parametrize("exponent", [0.05, 0.3, 1.0, 1.7, 1.95])
@pytest.mark.parametrize("std", [(0.3, 0.3), (0.1, 0.7), (0.001, 1.0)], ids=str)
@pytest.mark.parametrize("reach", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("width", [3, 64, 128])
def test_analytic_far_and_near(width, reach, std, exponent, generator):
    """Patches on both sides of the series' guard, within the accuracy it promises."""
    case = make_case(4, (10,), width, generator, std=std, reach=reach).to(torch.float32)
    options = {"exponent": exponent, "targets": "analytic"}
    expected = score_and_gradients(case.to(torch.float64, True), "reference", **options)
    actual = score_and_gradients(case.to(torch.float32, True), "torch", **options)
    # What the series promises (test_energy_score_expectation: 2e-6, 5e-5), and 30 roundings.
    assert_as_reference(actual, expected, torch.float32, (5e-6, 5e-5))


@pytest.mark.parametrize("needed", range(8), ids=lambda bits: f"{bits:03b}")
@pytest.mark.parametrize("targets", ["analytic", "sample"])
def test_each_set_of_gradients(targets, needed, generator):
    """A gradient does not depend on which others are asked for."""
    case = make_case(3, (5,), 64, generator).to(torch.float32)
    options = {"targets": targets, "num_targets": 4, "seed": 1}
    whole = score_and_gradients(case.to(torch.float32, True), "torch", **options)
    wanted = [bool(needed >> bit & 1) for bit in range(3)]
    inputs = [v.clone().requires_grad_(flag) for v, flag in zip(case, wanted, strict=True)]
    score = gaussian_energy_score(*inputs, backend="torch", **options)
    assert torch.equal(score, whole[0])
    assert score.requires_grad == any(wanted)
    chosen = [value for value, flag in zip(inputs, wanted, strict=True) if flag]
    if chosen:
        actual = differentiate(score, chosen)[1:]
        expected = [value for value, flag in zip(whole[1:], wanted, strict=True) if flag]
        # The same sums; a factor may come before or after one: 8 eps.
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_no_grad_computes_the_same_score(backend, generator):
    case = make_case(4, (6,), 40, generator).to(torch.float32, True)
    with_graph = gaussian_energy_score(*case, backend=backend)
    with torch.no_grad():
        without = gaussian_energy_score(*case, backend=backend)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


@pytest.mark.parametrize("patches", [(), (0,), (2, 0), (5,), (2, 3)], ids=str)
def test_any_number_of_patches(patches, backend, generator):
    case = make_case(3, patches, 8, generator).to(torch.float32, True)
    score, *gradients = score_and_gradients(case, backend)
    assert score.shape == patches
    assert [g.shape for g in gradients] == [value.shape for value in case]


def test_any_strides(backend, generator):
    case = make_case(4, (3, 5), 16, generator).to(torch.float32)
    expected = score_and_gradients(case.to(torch.float32, True), backend)
    views = [
        case.samples.movedim(0, 2).contiguous().movedim(2, 0),  # patch-major
        case.samples.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([case.samples, -case.samples], dim=-1)[..., 0],
    ]
    for samples in views:
        parameters = (v.clone().requires_grad_() for v in (case.mean, case.log_std))
        strided = Case(samples.detach().requires_grad_(), *parameters)
        assert not samples.is_contiguous()
        actual = score_and_gradients(strided, backend)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("exponent", "score"),
    [
        # pairs 2, 5, 3; targets 1, 1, 4
        (1.0, (2 + 5 + 3) / 3 - 2 * (1 + 1 + 4) / 3),
        (0.5, (2**0.5 + 5**0.5 + 3**0.5) / 3 - 2 * (1 + 1 + 2) / 3),
    ],
)
def test_by_hand(exponent, score, backend):
    samples = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    target = torch.tensor([[0.0, 1.0]])
    actual = energy_score(samples, target, exponent=exponent, backend=backend)
    assert actual.item() == pytest.approx(score, rel=1e-6)  # 8 eps of float32


@pytest.mark.parametrize("case", ["energy-k4", "energy-k2", "energy-k1"])
@pytest.mark.parametrize("index", range(3))
def test_as_the_published_code(case, index, backend):
    recorded = load_file(GOLDENS / case / "io.safetensors")
    prefix = f"score{index}."
    found = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
    inputs = [found[name].requires_grad_() for name in ("x", "mean", "log_std")]
    score = gaussian_energy_score(
        *inputs,
        exponent=recorded["score.alpha"].item(),
        target_noise=found["eps"],
        backend=backend,
    )
    torch.testing.assert_close(score, found["score"], rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(score.sum(), inputs)
    for name, gradient in zip(("grad_x", "grad_mean", "grad_log_std"), gradients, strict=True):
        assert torch.isfinite(gradient).all()
        if name in found:  # the published gradient of an exponent below 1 is NaN
            error = (gradient - found[name]).norm() / found[name].norm()
            assert error < 1e-5, name


def test_as_scoringrules(backend, generator):
    """The fair ensemble estimator of an outside library is minus half our score."""
    samples = torch.randn(5, 7, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)
    forecast = samples.movedim(0, -2)
    theirs = torch.stack(
        [
            scoringrules.es_ensemble(
                target, forecast, m_axis=-2, v_axis=-1, estimator="fair", backend="torch"
            )
            for target in targets
        ]
    )
    ours = energy_score(samples, targets, backend=backend)
    torch.testing.assert_close(ours, -2 * theirs.mean(0), rtol=1e-10, atol=1e-10)
