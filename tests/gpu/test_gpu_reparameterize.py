"""The reparameterization's kernels at full size: parity, the same draws, captured graphs."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import noise, reparameterize
from calm_kernels.noise import Stream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reparameterize_at_full_size(dtype):
    states = torch.randn(8192, 256, device="cuda").to(dtype)
    results = []
    for backend, kind in (("triton", dtype), ("torch", torch.float32)):
        leaf = states.to(kind).requires_grad_()
        latent, kl = reparameterize(leaf, kl_floor=0.5, dropout=0.15, seed=4, backend=backend)
        total = latent.float().square().mean() + kl.mean()
        results.append([latent, kl, *torch.autograd.grad(total, leaf)])
    for value, wanted in zip(*results, strict=True):
        assert torch.isfinite(value).all()
        assert relative_error(value, wanted) < 4e-3  # one bf16 rounding, at most 2^-8
    assert torch.equal(results[0][0] == 0, results[1][0] == 0)


def test_the_fast_noise_is_that_of_torch():
    """Through a latent with zero mean and unit variance: the noise itself."""
    states = torch.zeros(512, 256, device="cuda")
    latent, _ = reparameterize(states, kl_floor=0.0, seed=11, backend="triton")
    expected = noise.normal(512, 128, stream=Stream.LATENT, seed=11, device="cuda")
    error = (latent - expected).abs()
    # The fast logarithm errs by up to 2^-22 near 1, where -2 ln u is as small as 2^-20: its root by
    # less than that of 2 ln 2 x 2^-22, 6e-4.
    assert error.mean() < 1e-6 and error.max() < 1e-3


def test_a_replayed_graph_draws_afresh_and_backward_draws_the_same():
    states = torch.randn(300, 256, device="cuda", requires_grad=True)
    seed = torch.tensor([5, 0], device="cuda")
    options = {"kl_floor": 0.0, "dropout": 0.3, "seed": seed, "backend": "triton"}

    def step():
        latent, kl = reparameterize(states, **options)
        return latent, *torch.autograd.grad(latent.sum() + 0.0 * kl.sum(), states)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed[1] += 1
        latent, gradient = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(latent.clone())
        # d latent / d mean is the factor of the dropout: 0 exactly where the latent is.
        assert torch.equal(gradient[:, :128] == 0, latent == 0)
    assert not torch.equal(*replays)
    expected, _ = reparameterize(states, **options | {"seed": seed.clone()})
    assert torch.equal(replays[-1], expected)
