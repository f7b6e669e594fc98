"""The kernels inside torch: operator checks, compilation, autocast, a training run."""

import copy
from typing import ClassVar

import pytest
import torch
from model_cases import Launches, tiny_autoencoder, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import calm_kernels.reparameterize.function  # noqa: F401 - registers its operators
from calm_kernels import (
    energy_score,
    gaussian_energy_score,
    reparameterize,
    use_backend,
    warmup,
)
from calm_kernels.energy_score import analytic_kernels, direct_kernels, gram_kernels
from calm_kernels.energy_score.function import _analytic_op
from calm_kernels.reparameterize import kernels as latent_kernels

OPERATORS = torch.ops.calm_kernels
ENERGY_KERNELS = (analytic_kernels, direct_kernels, gram_kernels)
ROWS, WIDTH = 2, 8


def inputs(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, ROWS, WIDTH), (ROWS, WIDTH), (ROWS, WIDTH))
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


def operator_calls():
    """Each operator with arguments of a real call."""
    samples, mean, log_std = inputs()
    targets = samples[:2].detach().clone().requires_grad_()
    seed, row = torch.tensor([1, 0]), torch.tensor(0)
    weights = torch.tensor([[0.25, 0.5], [0.75, 0.5]], requires_grad=True)
    means, log_stds = (v.detach()[None].requires_grad_() for v in (mean, log_std))  # one Gaussian
    two = [torch.cat([v.detach(), v.detach() + 1]).requires_grad_() for v in (means, log_stds)]
    given, analytic = OPERATORS.energy_score.default, OPERATORS.analytic_energy_score.default
    yield given, (samples, targets, None, None, 1.0, True, True, False)
    yield given, (samples, targets, weights, None, 1.0, True, True, True)
    yield analytic, (samples, means, log_stds, None, None, 1.0, True, True, False)
    yield analytic, (samples, *two, weights, None, 1.0, True, True, True)
    yield (
        OPERATORS.drawn_energy_score.default,
        (samples, means, log_stds, torch.ones(ROWS), None, seed, row, 4, True, 0.5, True, True),
    )
    states = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    yield OPERATORS.reparameterize.default, (states, None, None, seed, row, 0.5, 0.25)


@pytest.mark.parametrize("call", list(operator_calls()), ids=lambda call: call[0].name())
def test_operators_keep_their_contract(call):
    """Schema, fake version and autograd registration, by torch's own checker."""
    operator, arguments = call
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=tests)


def score_and_latent(samples, mean, log_std):
    analytic = gaussian_energy_score(samples, mean, log_std, backend="triton")
    drawn = gaussian_energy_score(
        samples, mean, log_std, targets="antithetic", num_targets=4, backend="triton",
        seed=torch.tensor([3, 0]),
    )  # fmt: skip
    given = energy_score(samples, samples[:2].detach() + 1, backend="triton")
    latent, kl = reparameterize(
        torch.cat([mean, log_std], -1), kl_floor=0.1, dropout=0.25, backend="triton",
        seed=torch.tensor([4, 0]),
    )  # fmt: skip
    return (analytic + drawn + given + kl).sum() + latent.square().sum()


def test_one_graph_under_compile():
    eager = inputs()
    expected = torch.autograd.grad(score_and_latent(*eager), eager)
    compiled = torch.compile(score_and_latent, fullgraph=True, backend="aot_eager")
    traced = inputs()
    actual = torch.autograd.grad(compiled(*traced), traced)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("index", range(2), ids=["energy score", "reparameterize"])
def test_second_derivatives_are_refused(index):
    samples, mean, log_std = inputs()
    states = torch.cat([mean, log_std], -1)
    output = (
        gaussian_energy_score(samples, mean, log_std, backend="triton")
        if index == 0
        else reparameterize(states, kl_floor=0.1, seed=1, backend="triton")[1]
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.sum(), mean, create_graph=True)


def test_autocast_leaves_the_operators_alone():
    arguments = inputs()
    expected = score_and_latent(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = score_and_latent(*arguments)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def train(model, backend, steps=3):
    """Losses of a few steps and the weights after them; draws are addressed by (seed, step). In the
    interpreter auto is Triton.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(steps):
        tokens = torch.randint(64, (2, 8), generator=generator)
        labels = tokens.clone()
        labels[1, 6:] = -100
        with use_backend(backend):
            loss = model(tokens, labels=labels, seed=torch.tensor([5, step])).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([weight.detach().flatten() for weight in model.parameters()])


def assert_same_run(actual, expected):
    """The same losses, step by step, and the same weights; and something was learnt."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(set(actual[0])) == len(actual[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


# Each kernel and each kind of target once: all pairs are in test_interpreted_energy_score.py.
@pytest.mark.parametrize(
    ("targets", "latent_size"), [("analytic", 8), ("sample", 8), ("antithetic", 64)]
)
def test_a_training_run_is_that_of_torch(targets, latent_size, monkeypatch):
    model = tiny_model(targets=targets, latent_size=latent_size)
    expected = train(model, "torch")
    launches = Launches(monkeypatch, *ENERGY_KERNELS, latent_kernels)
    actual = train(model, "auto")
    drawn = "gram_kernel" if latent_size >= 64 else "direct_kernel"
    kernel = "analytic_kernel" if targets == "analytic" else drawn
    assert launches.names == [kernel] * len(actual[0])
    assert_same_run(actual, expected)


def test_an_autoencoder_run_is_that_of_torch(monkeypatch):
    model = tiny_autoencoder()
    expected = train(model, "torch")
    launches = Launches(monkeypatch, *ENERGY_KERNELS, latent_kernels)
    actual = train(model, "auto")
    assert launches.names == ["forward_kernel", "backward_kernel"] * len(actual[0])
    assert_same_run(actual, expected)


def test_warmup_launches_what_the_model_will(monkeypatch):
    launches = Launches(monkeypatch, *ENERGY_KERNELS, latent_kernels)
    assert warmup(tiny_model().config, "cpu", dtype=torch.float32) == [
        "gaussian_energy_score",
        "energy_head",
        "agreeing_patch",
        "norm_linear",
        "decode_attention",
        "chunk_record",
        "uniform_draws",
        "softmax_draws",
    ]
    assert launches.names == ["analytic_kernel"]
    assert warmup(tiny_autoencoder().config, "cpu") == [
        "reparameterize",
        "linear_cross_entropy",
        "linear_argmax",
        "norm_swiglu",
        "uniform_draws",
    ]
    assert launches.names[1:] == ["forward_kernel", "backward_kernel"]
    with use_backend("torch"):
        assert warmup(tiny_model().config, "cpu") == []


def test_modes_see_one_operator_and_plain_calls_none(monkeypatch):
    """Fake tensors know its result; torch's dispatch of it costs more than the launch."""
    samples, mean, log_std = inputs()
    operator = OPERATORS.analytic_energy_score.default

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    score = gaussian_energy_score(samples, mean, log_std, backend="triton")
    with Seen():
        traced = gaussian_energy_score(samples, mean, log_std, backend="triton")
    assert torch.equal(traced, score)
    assert Seen.names.count(operator._schema.name) == 1 and "aten::new_empty" not in Seen.names
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = gaussian_energy_score(samples, mean, log_std, backend="triton")
    assert fake.shape == score.shape and fake.requires_grad
    monkeypatch.setattr(_analytic_op, "_operator", None)
    again = gaussian_energy_score(samples, mean, log_std, backend="triton")
    assert torch.equal(again, score) and again.requires_grad
