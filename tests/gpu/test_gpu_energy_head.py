"""The head at full size: parity, the same draws, captured graphs, torch.compile, memory."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import EnergyHead
from calm_kernels.tuning import fuses_head


def make_head(width, num_blocks=4, noise_size=64, latent_size=128):
    torch.manual_seed(0)
    head = EnergyHead(width, latent_size, noise_size, num_blocks, init="scaled")
    for parameter in head.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return head.cuda()


def run(head, hidden, backend, **options):
    """Latents and the gradients of hidden states and parameters."""
    leaf = hidden.detach().requires_grad_()
    latent = head.sample(leaf, backend=backend, **options)
    upstream = torch.linspace(-1, 1, latent.numel(), device="cuda").view(latent.shape)
    total = (latent.float() * upstream).sum()
    return [latent.detach(), *torch.autograd.grad(total, [leaf, *head.parameters()])]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("width", [768, 1024, 1536, 2560])
def test_parity_at_full_size_under_autocast(width, recompute):
    """As near to float32 as the torch backend is."""
    head, hidden = make_head(width), torch.randn(1024, width, device="cuda")
    options = {"num_samples": 8, "seed": 3}
    truth = run(head, hidden, "torch", **options)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = run(head, hidden, "torch", **options)
        actual = run(head, hidden, "triton", recompute=recompute, **options)
    for value, other, wanted in zip(actual, plain, truth, strict=True):
        assert torch.isfinite(value).all()
        # Another order of the same sums, and one bf16 rounding more: as a norm 1.7e-3.
        assert relative_error(value, wanted) < 2 * relative_error(other, wanted) + 2e-3


@pytest.mark.parametrize(
    ("rows", "draws", "width", "noise_size"),
    [(1, 1, 8, 1), (7, 3, 33, 9), (65, 5, 100, 64), (129, 1, 1000, 70), (3, 200, 4096, 256)],
)
def test_odd_sizes_in_float32(rows, draws, width, noise_size):
    head = make_head(width, 2, noise_size, 17)
    hidden = torch.randn(rows, width, device="cuda")
    options = {"num_samples": draws, "seed": 1, "first_row": 5}
    actual, expected = run(head, hidden, "triton", **options), run(head, hidden, "torch", **options)
    for value, wanted in zip(actual, expected, strict=True):
        # Matmuls as three of tf32, each with the error of float32; fast exponentials of 1e-6 in the
        # activations, and two blocks behind each other.
        assert relative_error(value, wanted) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "draws", "width"),
    [(1, 1, 1024), (16, 1, 768), (17, 1, 48), (1, 200, 1024), (5, 51, 1536), (2, 200, 2560),
     (4, 256, 1024), (1, 100, 4096), (3, 100, 1072)],
)  # fmt: skip
@torch.no_grad()
def test_few_rows_without_gradients(rows, draws, width, dtype):
    """Products with all around them: as near to float32 as the torch backend, same bits again."""
    assert fuses_head(rows * draws, width)
    head, hidden = make_head(width), torch.randn(rows, width, device="cuda")
    options = {"num_samples": draws, "seed": 3}
    truth = head.sample(hidden, backend="torch", **options)
    wide = head.sample(hidden, backend="triton", **options)
    assert relative_error(wide, truth) < 1e-4
    head, hidden = head.to(dtype), hidden.to(dtype)
    plain = head.sample(hidden, backend="torch", **options)
    actual = head.sample(hidden, backend="triton", **options)
    assert relative_error(actual, truth) < 2 * relative_error(plain, truth) + 2e-3
    assert torch.equal(actual, head.sample(hidden, backend="triton", **options))


@pytest.mark.parametrize("rows", [1, 16])
def test_a_replayed_decode_draws_afresh(rows):
    head = make_head(1024).bfloat16().requires_grad_(False)
    hidden = torch.randn(rows, 1024, device="cuda").bfloat16()
    seed, first_row = torch.tensor([5, 0], device="cuda"), torch.tensor(3, device="cuda")
    options = {"num_samples": 200, "first_row": first_row, "backend": "triton"}
    head.sample(hidden, seed=seed, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed[1] += 1
        latent = head.sample(hidden, seed=seed, **options)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(latent.clone())
    assert not torch.equal(*replays)
    assert torch.equal(replays[1], head.sample(hidden, seed=seed.clone(), **options))


def test_compile_gives_the_same():
    head, hidden = make_head(1024, 2), torch.randn(64, 1024, device="cuda", requires_grad=True)
    seed = torch.tensor([2, 0], device="cuda")

    def total(hidden):
        return head.sample(hidden, num_samples=4, seed=seed, backend="triton").square().sum()

    wanted = [hidden, *head.parameters()]
    eager = torch.autograd.grad(total(hidden), wanted)
    compiled = torch.autograd.grad(torch.compile(total, fullgraph=True)(hidden), wanted)
    torch.testing.assert_close(compiled, eager)


def test_gradients_are_deterministic():
    head, hidden = make_head(1024, 2), torch.randn(512, 1024, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        first, second = (run(head, hidden, "triton", num_samples=8, seed=1) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_memory_is_below_the_published_module():
    head, hidden = make_head(1024), torch.randn(8192, 1024, device="cuda")
    peaks = {}
    for name, backend, recompute in (
        ("kept", "triton", False), ("recomputed", "triton", True), ("published", "reference", False)
    ):  # fmt: skip
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(head, hidden, backend, num_samples=8, seed=1, recompute=recompute)
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks["kept"] < 0.6 * peaks["published"]
    assert peaks["recomputed"] < 0.7 * peaks["kept"]
