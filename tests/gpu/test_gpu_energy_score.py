"""The energy score's kernels at full size: parity, captured graphs, torch.compile, memory."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import energy_score, gaussian_energy_score

MODES = ("analytic", "antithetic", "sample")
# Relative error of the gradient, norm over norm; scores are compared to a third of it. bf16: one
# rounding of the result, by up to 2^-8, as a norm 1.7e-3, and as much of the operands, squared and
# added. float32: both operands of a matmul are rounded to tf32, by up to 2^-11 = 4.9e-4 each.
GRADIENT = {torch.bfloat16: 3e-3, torch.float32: 1e-3}


def make_inputs(rows, num_samples=8, width=128, dtype=torch.bfloat16, spread=0.2, seed=0):
    """Samples in patch-major memory around posteriors of uneven width."""
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    mean = torch.randn(rows, width, **options)
    log_std = -1.2 + spread * torch.randn(rows, width, **options)
    offset = log_std.exp()[:, None] * torch.randn(rows, num_samples, width, **options)
    samples = (mean[:, None] + 1.3 * offset).to(dtype).transpose(0, 1)
    inputs = (samples, mean.to(dtype), log_std.to(dtype))
    return [value.detach().requires_grad_() for value in inputs]


def run(inputs, backend, **options):
    score = gaussian_energy_score(*inputs, backend=backend, **options)
    return [score.detach(), *torch.autograd.grad(score.mean(), inputs)]


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_parity_at_full_size(exponent, mode, dtype):
    inputs = make_inputs(8192, dtype=dtype)
    options = {"exponent": exponent, "targets": mode, "num_targets": 100, "seed": 3}
    actual = run(inputs, "triton", **options)
    wide = [value.detach().float().requires_grad_() for value in inputs]
    expected = run(wide, "torch", **options)
    assert relative_error(actual[0], expected[0]) < GRADIENT[dtype] / 3
    for value, wanted in zip(actual[1:], expected[1:], strict=True):
        assert torch.isfinite(value).all()
        assert relative_error(value, wanted) < GRADIENT[dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rows", "num_samples", "width"), [(7, 2, 1), (65, 3, 33), (129, 11, 100), (50, 16, 1024)]
)
def test_odd_sizes(rows, num_samples, width, mode):
    inputs = make_inputs(rows, num_samples, width, torch.float32)
    options = {"targets": mode, "num_targets": 18, "seed": 1}
    actual, expected = run(inputs, "triton", **options), run(inputs, "torch", **options)
    for value, wanted in zip(actual, expected, strict=True):
        assert relative_error(value, wanted) < 2e-3  # tf32; few numbers, whose errors average less


def test_quadrature_of_uneven_targets():
    inputs = make_inputs(512, dtype=torch.float32, spread=1.5)
    actual, expected = run(inputs, "triton"), run(inputs, "torch")
    for value, wanted in zip(actual, expected, strict=True):
        assert relative_error(value, wanted) < 1e-4  # 48 nodes, fast logarithms of 1e-6 each


def test_given_targets_and_their_gradient():
    samples, mean, _ = make_inputs(1024, dtype=torch.float32)
    draws = torch.randn(100, *mean.shape, device="cuda", requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        score = energy_score(samples, draws, backend=backend)
        results.append([score, *torch.autograd.grad(score.mean(), (samples, draws))])
    for value, wanted in zip(*results, strict=True):
        assert relative_error(value, wanted) < 1e-5  # differences, no matmul: see FP32 of triton/


@pytest.mark.parametrize("kind", ["given", "mixture"])
def test_weights_of_targets_and_every_gradient(kind):
    """Signed weights, some of them 0; one block of samples and two."""
    for num_samples in (8, 16):
        samples, mean, log_std = make_inputs(256, num_samples, dtype=torch.float32)
        generator = torch.Generator("cuda").manual_seed(1)
        options = {"device": "cuda", "generator": generator}
        places = mean.detach() + torch.randn(5, *mean.shape, **options)
        points = [places, log_std.detach().expand_as(places).clone()][: 1 + (kind == "mixture")]
        weights = torch.randn(5, 256, **options) + 0.2
        weights[0, ::2] = 0
        leaves = [samples, *(value.requires_grad_() for value in (*points, weights))]
        score = energy_score if kind == "given" else gaussian_energy_score
        results = []
        for backend in ("triton", "torch"):
            value = score(*leaves[:-1], target_weights=weights, backend=backend)
            results.append([value, *torch.autograd.grad(value.mean(), leaves)])
        for value, wanted in zip(*results, strict=True):
            assert relative_error(value, wanted) < 2e-5  # no matmul; approximate logarithms


@pytest.mark.parametrize("mode", MODES)
def test_a_replayed_graph_draws_afresh(mode):
    inputs = [value.detach() for value in make_inputs(256)]
    seed = torch.tensor([5, 0], device="cuda")
    options = {"targets": mode, "num_targets": 16, "seed": seed, "backend": "triton"}
    gaussian_energy_score(*inputs, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed[1] += 1
        score = gaussian_energy_score(*inputs, **options)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(score.clone())
    expected = gaussian_energy_score(*inputs, **options | {"seed": seed.clone()})
    assert torch.equal(replays[-1], expected)
    assert torch.equal(replays[0], replays[1]) == (mode == "analytic")


def test_compile_gives_the_same_with_weights():
    samples, mean, log_std = make_inputs(64)
    points = [
        value.detach().expand(3, -1, -1).clone().requires_grad_() for value in (mean, log_std)
    ]
    weights = torch.rand(3, 64, device="cuda", requires_grad=True)

    def loss(samples, mean, log_std, weights):
        options = {"target_weights": weights, "backend": "triton"}
        given = energy_score(samples, mean, **options)
        return (given + gaussian_energy_score(samples, mean, log_std, **options)).mean()

    inputs = [samples, *points, weights]
    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for value, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, wanted)


def test_compile_gives_the_same():
    inputs = make_inputs(512)

    def loss(*tensors):
        return gaussian_energy_score(*tensors, backend="triton").mean()

    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for value, wanted in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_outputs_and_gradients(mode):
    inputs = make_inputs(8192)
    options = {"targets": mode, "seed": torch.zeros(2, dtype=torch.int64, device="cuda")}
    run(inputs, "triton", **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, "triton", **options)
    stored = sum(value.nbytes for value in inputs) + 2 * 4 * inputs[1].numel()
    assert torch.cuda.max_memory_allocated() - before < 2.2 * stored
