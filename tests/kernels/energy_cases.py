"""Inputs of the energy score, and how a backend is compared with the float64 reference."""

from typing import NamedTuple

import torch

from calm_kernels.energy_score import gaussian_energy_score

EXPONENTS = (0.5, 1.0, 1.5)

# Largest relative error (norm of the difference over the norm): score, gradients. Scores of bf16
# inputs are computed in fp32; their gradients are rounded to bf16 once, by up to 2^-8 = 3.9e-3.
# float32, u = 6e-8: a distance is rounded some 10 times (log2 L additions, a root, a power), and
# fidelity - diversity is a third of its terms: 3 x 10 u. Pulls in all directions cancel in a
# gradient to a tenth: ten times that. float64: ten times the error of the quadrature, 1e-10.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-6, 2e-5),
    torch.bfloat16: (2e-6, 4e-3),
}


class Case(NamedTuple):
    """Samples ``[N, ..., L]``, and mean and log_std ``[..., L]`` of their target."""

    samples: torch.Tensor
    mean: torch.Tensor
    log_std: torch.Tensor

    def to(self, dtype, requires_grad=False):
        """The same numbers in another dtype, detached."""
        return Case(*(value.detach().to(dtype).requires_grad_(requires_grad) for value in self))


def make_case(num_samples, patches, width, generator, *, std=(0.1, 0.7), reach=1.0):
    """A posterior with deviations in `std`, and samples `reach` deviations around its mean."""
    options = {"generator": generator, "dtype": torch.float64}
    mean = torch.randn(*patches, width, **options)
    deviation = std[0] + (std[1] - std[0]) * torch.rand(*patches, width, **options)
    samples = mean + reach * deviation * torch.randn(num_samples, *patches, width, **options)
    return Case(samples, mean, torch.log(deviation))


def differentiate(score, inputs):
    """Score, and its gradients for upstream factors that differ from patch to patch."""
    factors = torch.linspace(0.5, 1.5, score.numel(), dtype=torch.float64).view(score.shape)
    gradients = torch.autograd.grad((score * factors.to(score)).sum(), inputs)
    return [score.detach(), *gradients]


def score_and_gradients(case, backend, **options):
    """Score of the case and its gradients in samples, mean and log_std."""
    return differentiate(gaussian_energy_score(*case, backend=backend, **options), case)


def assert_nan_shows(case, poisoned, backend, **options):
    """One NaN in an input of the first patch: its score, terms and gradients are NaN, others stay.

    Args:
        case: two patches.
        poisoned: the input that gets the NaN: samples, mean, log_std, noise or weight.
        backend: to test.
        options: of `gaussian_energy_score`.
    """
    case, options = case.to(torch.float32), {"num_targets": 4, "seed": 2, **options}
    expected = gaussian_energy_score(*case, backend=backend, **options)
    inputs = {
        **case._asdict(),
        "noise": options.get("target_noise"),
        "weight": options.get("weight"),
    }
    changed = {**inputs, poisoned: inputs[poisoned].clone()}
    changed[poisoned][(0,) if poisoned == "weight" else (..., 0, 3)] = float("nan")
    options |= {"target_noise": changed["noise"], "weight": changed["weight"]}
    case = Case(*(changed[name] for name in Case._fields)).to(torch.float32, True)
    options["return_diagnostics"] = True
    score, terms = gaussian_energy_score(*case, backend=backend, **options)
    assert score[0].isnan()
    torch.testing.assert_close(score[1], expected[1])
    assert terms.fidelity[0].isnan() and terms.fidelity[1].isfinite()
    if terms.max_r2 is not None and poisoned != "weight":
        assert terms.max_r2[0].isnan() and terms.max_r2[1].isfinite()
    for gradient in torch.autograd.grad(score.sum(), case):
        assert gradient[..., 0, :].isnan().all() and gradient[..., 1, :].isfinite().all()


def assert_as_reference(actual, expected, dtype, tolerances=None):
    """Score and gradients are as close to the float64 reference as `dtype` allows."""
    score_tolerance, gradient_tolerance = tolerances or TOLERANCES[dtype]
    for index, (value, truth) in enumerate(zip(actual, expected, strict=True)):
        assert torch.isfinite(value).all()
        assert value.shape == truth.shape
        error = (value.double() - truth).norm() / truth.norm().clamp_min(1e-30)
        tolerance = gradient_tolerance if index else score_tolerance
        assert error <= tolerance, f"output {index}: relative error {error:.1e}"
