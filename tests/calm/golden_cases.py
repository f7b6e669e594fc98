"""The recorded cases of the published code; `tests/goldens/README.md` says what they hold."""

from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
AUTOENCODERS = ("autoencoder-k4", "autoencoder-k2", "autoencoder-k1")
ENERGY = ("energy-k4", "energy-k2", "energy-k1")
DENOISING = ("diffusion-k4", "flow-k4")

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


def tensors(case):
    """What the published code took and gave."""
    return load_file(GOLDENS / case / "io.safetensors")


def draws_in_order(recorded, prefix):
    """Draws ``prefix.d000_*``, ``prefix.d001_*``, ... as a list."""
    names = sorted(name for name in recorded if name.startswith(f"{prefix}.d"))
    return [recorded[name] for name in names if name[len(prefix) + 2 :][:3].isdigit()]


def relative_error(actual, expected):
    """Largest deviation over the largest expected magnitude."""
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()


def assert_close(actual, expected, tolerance=OUTPUT_TOLERANCE):
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = relative_error(actual, expected)
    assert error < tolerance, f"relative error {error:.2e}"


def assert_gradients(model, recorded, expected_count):
    """Every recorded gradient, and as many as are expected."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = [name for name in recorded if name.startswith("train.grad.")]
    assert len(names) == expected_count
    for name in names:
        gradient = gradients[name.removeprefix("train.grad.")]
        error = relative_error(gradient, recorded[name])
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.2e}"
