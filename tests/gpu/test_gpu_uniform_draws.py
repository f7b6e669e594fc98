"""Draws at full size: the same bits as in torch, and afresh in every replay of a graph."""

import pytest
import torch

from calm_kernels import noise, normal_draws, uniform_draws
from calm_kernels.noise import Stream

SIZES = {"one number": (1, 1, 1), "tokens": (64, 4, 200), "latents": (8192, 128, 8)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first_row", [0, 2**33, torch.tensor(7)], ids=str)
def test_the_draws_of_torch(size, first_row):
    rows, width, count = SIZES[size]
    seed = torch.tensor([2**62 + 5, 1 << 40], device="cuda")
    options = {
        "stream": Stream.HEAD, "seed": seed, "num_draws": count, "device": "cuda",
        "first_row": first_row if isinstance(first_row, int) else first_row.cuda(),
    }  # fmt: skip
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        actual = uniform_draws(rows, width, **options, dtype=dtype, backend="triton")
        assert torch.equal(actual, noise.uniform(rows, width, **options, dtype=dtype))
    actual = normal_draws(rows, width, **options, backend="triton")
    error = (actual - noise.normal(rows, width, **options)).abs()
    assert error.mean() < 1e-5 and error.max() < 1e-3  # see test_gpu_reparameterize.py


def test_a_replayed_graph_draws_afresh():
    seed = torch.tensor([[5, 0], [6, 0]], device="cuda")
    options = {"stream": Stream.VOTE, "seed": seed, "device": "cuda"}
    graph, expected = torch.cuda.CUDAGraph(), []
    uniform_draws(2, 3, **options, backend="triton")  # compiles
    for _ in range(2):
        expected.append(noise.uniform(2, 3, **options))
        seed[:, 1] += 1
    seed[:, 1] = 0
    with torch.cuda.graph(graph):
        drawn = uniform_draws(2, 3, **options, backend="triton")
        seed[:, 1] += 1
    for wanted in expected:
        graph.replay()
        assert torch.equal(drawn, wanted)
