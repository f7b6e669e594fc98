"""The reparameterization's kernels against the torch backend and the float64 reference."""

import pytest
import torch
from helpers import sparse_memory

from calm_kernels import reparameterize

SHAPES = [(3, 5), (2, 2, 64), (9, 100), (17, 128), (5, 1)]


def make_states(shape, generator):
    return 0.7 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)


def run(states, backend, dtype=torch.float32, **options):
    """Latent, KL and the gradient of the states."""
    leaf = states.to(dtype).requires_grad_()
    latent, kl = reparameterize(leaf, kl_floor=0.2, backend=backend, **options)
    upstream = torch.linspace(-1, 1, latent.numel(), dtype=torch.float64).view(latent.shape)
    total = (latent.double() * upstream).sum() + (kl.double() * upstream[..., 0]).sum()
    return [latent.detach(), kl.detach(), *torch.autograd.grad(total, leaf)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drawn(shape, dropout, generator):
    states = make_states(shape, generator)
    options = {"dropout": dropout, "seed": 5, "first_row": 7}
    actual = run(states, "triton", **options)
    expected = run(states, "torch", **options)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[0] == 0, expected[0] == 0)  # the same elements dropped


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_given(shape, generator):
    states = make_states(shape, generator)
    options = {
        "dropout": 0.25,
        "latent_noise": torch.randn(shape, generator=generator),
        "latent_keep": torch.rand(shape, generator=generator) > 0.25,
    }
    actual = run(states, "triton", **options)
    expected = run(states, "reference", torch.float64, **options)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_and_strides(generator):
    states = make_states((6, 16), generator).bfloat16()
    plain = run(states, "triton", torch.bfloat16, seed=1)
    assert [value.dtype for value in plain] == [torch.bfloat16, torch.float32, torch.bfloat16]
    strided = torch.stack([states, states], -1)[..., 0].detach().requires_grad_()
    latent, kl = reparameterize(strided, kl_floor=0.2, seed=1, backend="triton")
    assert torch.equal(latent, plain[0]) and torch.equal(kl, plain[1])


def test_the_floor_is_that_of_clamp():
    """At the floor the gradient passes, below it does not."""
    states = torch.tensor([[0.0, 1.0, 0.0, 0.0]], requires_grad=True)  # kl 0 and 1/2
    for floor, expected in ((0.5, [0.0, 1.0]), (0.51, [0.0, 0.0]), (0.0, [0.0, 1.0])):
        _, kl = reparameterize(states, kl_floor=floor, seed=0, backend="triton")
        (gradient,) = torch.autograd.grad(kl.sum(), states)
        assert gradient[0, :2].tolist() == expected


def test_only_one_result_used(generator):
    states = make_states((4, 8), generator).requires_grad_()
    for index in range(2):
        outputs = [
            reparameterize(states, kl_floor=0.1, seed=3, backend=name)[index].sum()
            for name in ("triton", "torch")
        ]
        actual, expected = (torch.autograd.grad(value, states)[0] for value in outputs)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_any_strides(generator):
    states = make_states((4, 8), generator).requires_grad_()
    upstream = torch.randn(8, 4, generator=generator).T  # not contiguous
    results = []
    for backend in ("triton", "torch"):
        latent, kl = reparameterize(states, kl_floor=0.1, seed=3, backend=backend)
        results.append(torch.autograd.grad((latent, kl), states, (upstream, upstream[:, 1]))[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_bad_input_keeps_it_to_itself(bad, generator):
    states = make_states((5, 8), generator)
    expected = run(states.clone(), "triton", seed=2)
    states[2, 11] = bad  # a log_std
    for value, wanted in zip(run(states, "triton", seed=2), expected, strict=True):
        assert not value[2].isfinite().all()
        assert torch.equal(value[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


def test_offsets_beyond_32_bits(generator):
    """Rows 2^31 elements apart."""
    states = make_states((2, 8), generator).bfloat16()
    far = sparse_memory(2**31 + 16, torch.bfloat16).as_strided((2, 16), (2**31, 1))
    expected = run(states, "triton", torch.bfloat16, seed=1)
    leaf = far.copy_(states).requires_grad_()
    latent, kl = reparameterize(leaf, kl_floor=0.2, seed=1, backend="triton")
    assert torch.equal(latent, expected[0]) and torch.equal(kl, expected[1])


def test_nothing_drawn_is_kept(generator):
    """Neither noise nor mask outlives the forward pass."""
    states = make_states((64, 16), generator).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reparameterize(states, kl_floor=0.1, dropout=0.5, seed=3, backend="triton")
    assert sum(kept.values()) <= states.nbytes + 64


def test_empty_and_refused():
    latent, kl = reparameterize(torch.zeros(2, 0, 8), kl_floor=0.1, seed=1, backend="triton")
    assert latent.shape == (2, 0, 4) and kl.shape == (2, 0)
    with pytest.raises(ValueError, match="one row per row of latents, 2; got 3"):
        seeds = torch.tensor([1, 2, 3])
        reparameterize(torch.zeros(2, 8), kl_floor=0.1, seed=seeds, backend="triton")
    with pytest.raises(ValueError, match="no float64"):
        reparameterize(torch.zeros(2, 8).double(), kl_floor=0.1, backend="triton")
    with pytest.raises(ValueError, match="latent sizes up to 4096, got 5000"):
        reparameterize(torch.zeros(2, 10000), kl_floor=0.1, backend="triton")
