"""Tokens drawn at full size: those of torch, and afresh in every replay of a graph."""

import pytest
import torch

from calm_kernels import softmax_draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "draws", "vocab_size"),
    [(1, 1, 128_256), (64, 200, 128_256), (800, 1, 50_257), (3, 5, 1000)],
)
def test_the_tokens_of_torch(rows, draws, vocab_size, dtype):
    """Sums in another order differ by 1e-9, a token's share of the interval is 1e-5."""
    torch.manual_seed(rows)
    logits = 3 * torch.randn(rows, vocab_size, device="cuda").to(dtype)
    logits[-1, -1] = float("nan")
    for temperature in (1.0, 0.5, 0.0):
        options = {"temperature": temperature, "num_draws": draws, "seed": 3}
        tokens, is_finite = softmax_draws(logits, **options, backend="triton")
        expected, are_finite = softmax_draws(logits, **options, backend="torch")
        assert torch.equal(is_finite, are_finite) and not is_finite[-1]
        assert ((tokens >= 0) & (tokens < vocab_size)).all()
        share = (tokens == expected)[:-1].double().mean() if rows > 1 else 1.0
        assert share > 0.998


def test_a_replayed_graph_draws_afresh():
    torch.manual_seed(0)
    logits = torch.randn(4, 1000, device="cuda").bfloat16()
    seed = torch.tensor([[5, 0], [6, 0], [7, 0], [8, 0]], device="cuda")
    softmax_draws(logits, seed=seed, backend="triton")  # compiles
    expected = []
    for _ in range(3):
        expected.append(softmax_draws(logits, seed=seed, backend="torch")[0])
        seed[:, 1] += 1
    seed[:, 1] = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = softmax_draws(logits, seed=seed, backend="triton")
        seed[:, 1] += 1
    for wanted in expected:
        graph.replay()
        assert torch.equal(tokens, wanted)
