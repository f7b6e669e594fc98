"""Every wrong input of the energy score gives one error that names it."""

import pytest
import torch

from calm_kernels.backend import use_backend
from calm_kernels.energy_score import energy_score, expected_distance, gaussian_energy_score

SAMPLES, MEAN = torch.zeros(3, 2, 5, 4), torch.zeros(2, 5, 4)
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": [1.0]}, TypeError, r"samples must be a tensor, got list"),
        ({"samples": SAMPLES.long()}, TypeError, r"samples must have dtype .*int64"),
        ({"samples": torch.zeros(3)}, ValueError, r"samples must have at least 2 dimensions"),
        ({"samples": SAMPLES[:1]}, ValueError, r"at least 2 draws.*\(1, 2, 5, 4\)"),
        ({"samples": SAMPLES[..., :0]}, ValueError, r"latent size >= 1"),
        ({"mean": None}, TypeError, r"mean must be a tensor, got NoneType"),
        ({"mean": MEAN.bool()}, TypeError, r"mean must have dtype"),
        ({"mean": MEAN[:1]}, ValueError, r"mean must have shape \(2, 5, 4\).*\(1, 5, 4\)"),
        ({"mean": MEAN.to("meta")}, ValueError, r"mean must be on the device of samples"),
        ({"log_std": MEAN[..., :3]}, ValueError, r"log_std must have shape \(2, 5, 4\)"),
        ({"log_std": MEAN.to(torch.complex64)}, TypeError, r"log_std must have dtype"),
        ({"exponent": 0.0}, ValueError, r"exponent must lie in \(0, 2\).*0.0"),
        ({"exponent": 2.0}, ValueError, r"exponent must lie in \(0, 2\)"),
        ({"exponent": -1.0}, ValueError, r"exponent must lie in \(0, 2\)"),
        ({"exponent": NAN}, ValueError, r"exponent must lie in \(0, 2\).*nan"),
        ({"weight": 1.0}, TypeError, r"weight must be a tensor"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(2, 5\).*\(5,\)"),
        ({"weight": torch.ones(2, 5).bool()}, TypeError, r"weight must have dtype"),
        ({"weight": torch.ones(2, 5, device="meta")}, ValueError, r"weight must be on the device"),
        ({"weight": torch.ones(2, 5, requires_grad=True)}, ValueError, r"weight must not require"),
        ({"targets": "exact"}, ValueError, r"targets must be one of analytic.*'exact'"),
        ({"num_targets": 0}, ValueError, r"num_targets must be at least 1, got 0"),
        ({"num_targets": 2.0}, TypeError, r"num_targets must be an integer, got float"),
        (
            {"targets": "antithetic", "num_targets": 5},
            ValueError,
            r"num_targets must be even.*got 5",
        ),
        ({"target_noise": 3}, TypeError, r"target_noise must be a tensor"),
        ({"target_noise": torch.zeros(7, 9, 4)}, ValueError, r"10 rows between.*\(7, 9, 4\)"),
        ({"target_noise": torch.zeros(7, 10, 3)}, ValueError, r"\[M, ..., 4\].*\(7, 10, 3\)"),
        ({"target_noise": torch.zeros(0, 10, 4)}, ValueError, r"M >= 1"),
        ({"target_noise": torch.zeros(7, 10, 4).int()}, TypeError, r"target_noise must have dtype"),
        ({"targets": "sample", "seed": 1.5}, TypeError, r"seed must be an int"),
        ({"targets": "sample", "seed": 2**64}, ValueError, r"seed must fit into 64 bits"),
        ({"targets": "sample", "seed": torch.ones(2)}, TypeError, r"seed must have dtype int64"),
        (
            {"targets": "sample", "seed": torch.ones(7, dtype=torch.int64)},
            ValueError,
            r"seed must have one row per position, 10; got 7",
        ),
        ({"backend": "cuda"}, ValueError, r"backend must be one of"),
    ],
)
def test_gaussian_energy_score(change, error, message):
    arguments = {"samples": SAMPLES, "mean": MEAN, "log_std": MEAN} | change
    positional = [arguments.pop(name) for name in ("samples", "mean", "log_std")]
    with pytest.raises(error, match=message):
        gaussian_energy_score(*positional, **arguments)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, TypeError, r"targets must be a tensor"),
        (torch.zeros(7, 2, 5, 3), ValueError, r"targets must have shape \(7, 2, 5, 4\)"),
        (torch.zeros(7, 10, 4), ValueError, r"targets must have shape"),
        (torch.zeros(0, 2, 5, 4), ValueError, r"targets must hold at least 1 draw"),
        (torch.zeros(7, 2, 5, 4).long(), TypeError, r"targets must have dtype"),
        (torch.zeros(7, 2, 5, 4, device="meta"), ValueError, r"targets must be on the device"),
    ],
)
def test_energy_score(targets, error, message):
    with pytest.raises(error, match=message):
        energy_score(SAMPLES, targets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offset": 1.0}, TypeError, r"offset must be a tensor"),
        ({"offset": MEAN.long()}, TypeError, r"offset must have dtype"),
        ({"offset": torch.tensor(1.0)}, ValueError, r"offset must have at least 1 dimensions"),
        ({"std": MEAN[0]}, ValueError, r"std must have shape \(2, 5, 4\)"),
        ({"std": MEAN.to("meta")}, ValueError, r"std must be on the device of offset"),
        ({"exponent": 2.5}, ValueError, r"exponent must lie in \(0, 2\)"),
        ({"method": "exact"}, ValueError, r"method must be one of auto, series, quadrature"),
    ],
)
def test_expected_distance(change, error, message):
    with pytest.raises(error, match=message):
        expected_distance(**{"offset": MEAN, "std": MEAN} | change)


def test_given_noise_means_drawn_targets(backend, generator):
    """Whatever `targets` says, and however the noise arranges its rows."""
    samples = torch.randn(3, 2, 5, 4, generator=generator)
    noise = torch.randn(6, 10, 4, generator=generator)
    options = {"backend": backend, "num_targets": 9}
    mean = torch.randn(2, 5, 4, generator=generator)
    expected = energy_score(samples, mean + noise.view(6, 2, 5, 4) * 1.0, backend=backend)
    for targets in ("analytic", "antithetic", "sample"):
        for shape in ((6, 10, 4), (6, 2, 5, 4), (6, 5, 2, 4)):
            score = gaussian_energy_score(
                samples, mean, MEAN, targets=targets, target_noise=noise.view(shape), **options
            )
            torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


def test_an_explicit_backend_never_falls_back():
    for function in (
        energy_score,
        lambda x, m, **options: gaussian_energy_score(x, m, m, **options),
    ):
        target = MEAN[None] if function is energy_score else MEAN
        with pytest.raises((NotImplementedError, ValueError), match="triton"):
            function(SAMPLES, target, backend="triton")


def test_backend_of_the_context():
    with use_backend("reference"):
        score = gaussian_energy_score(SAMPLES.clone().requires_grad_(), MEAN, MEAN)
    assert "StoredGradients" not in str(score.grad_fn.next_functions)
    with use_backend("torch"):
        score = gaussian_energy_score(SAMPLES.clone().requires_grad_(), MEAN, MEAN)
    assert "StoredGradients" in str(score.grad_fn.next_functions)
