"""The one place that chooses a backend: precedence, refusals, and what torch.compile sees."""

import pytest
import torch

from calm_kernels import energy_head, linear_argmax, reparameterize, set_backend, use_backend
from calm_kernels.backend import OPERATIONS, Backend, resolve
from calm_kernels.energy_head import EnergyHead

CPU = torch.zeros(2)


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("CALM_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("calm_kernels.backend._process_backend", None)


def test_auto_takes_torch_on_a_cpu_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr("calm_kernels.backend._logged", set())
    with caplog.at_level("INFO", logger="calm_kernels.backend"):
        for _ in range(3):
            assert resolve("auto", "energy_score", CPU) is Backend.TORCH
    assert len(caplog.records) == 1 and "torch" in caplog.text


def test_argument_beats_context_beats_process():
    set_backend("torch")
    with use_backend("reference"):
        assert resolve("auto", "energy_head", CPU) is Backend.REFERENCE
        assert resolve("torch", "energy_head", CPU) is Backend.TORCH
    assert resolve("auto", "energy_head", CPU) is Backend.TORCH


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("CALM_KERNELS_BACKEND", "reference")
    assert resolve("auto", "energy_head", CPU) is Backend.REFERENCE
    monkeypatch.setenv("CALM_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"CALM_KERNELS_BACKEND must be one of .*'fast'"):
        resolve("auto", "energy_head", CPU)


def test_a_context_ends_when_its_block_raises():
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert resolve("auto", "energy_head", CPU) is Backend.TORCH


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(ValueError, match=r"backend must be one of .*'cuda'"):
        resolve("cuda", "energy_head", CPU)
    for operation, backends in OPERATIONS.items():
        error = ValueError if Backend.TRITON in backends else NotImplementedError
        with pytest.raises(error, match=operation), use_backend("triton"):
            resolve("auto", operation, CPU)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("calm_kernels.backend.has_triton", lambda: False)
    with pytest.raises(ImportError, match="pip install triton"):
        resolve("triton", "energy_score", CPU)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_automatic_choice_compiles_into_one_graph():
    head = EnergyHead(32, 16, 8, 2, init="scaled")
    hidden, noise = torch.randn(4, 32), torch.rand(3, 4, 8) - 0.5
    weight = torch.randn(97, 32)

    def run(hidden, noise, weight):
        latent, kl = reparameterize(hidden, kl_floor=0.5, latent_noise=hidden[:, :16])
        return energy_head(hidden, noise, head), latent, kl, linear_argmax(hidden, weight)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        compiled(hidden, noise, weight), run(hidden, noise, weight), strict=True
    ):
        torch.testing.assert_close(ours, expected)
