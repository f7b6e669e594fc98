"""The argmax kernels at full size: parity, exact ties, graphs, no logits in memory."""

import pytest
import torch

from calm_kernels import linear_argmax

VOCAB_SIZE, WIDTH = 128_256, 512
# A difference of two logits that the order of their sums cannot turn round: logits are up to 110,
# and 512 / 16 sums cut off up to 2^-23 of that each, 4e-4 in all.
MARGIN = {torch.bfloat16: 1e-3, torch.float16: 1e-3, torch.float32: 1e-3}


def make_inputs(rows, vocab_size=VOCAB_SIZE, width=WIDTH, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(rows)
    options = {"device": "cuda", "generator": generator}
    hidden, weight = torch.randn(rows, width, **options), torch.randn(vocab_size, width, **options)
    return hidden.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", MARGIN, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 64, 65, 800, 4099])
def test_parity_at_full_size(rows, dtype):
    hidden, weight = make_inputs(rows, dtype=dtype)
    index, largest, logsumexp = linear_argmax(
        hidden, weight, return_max=True, return_logsumexp=True, backend="triton"
    )
    assert torch.equal(linear_argmax(hidden, weight, backend="triton"), index)
    logits = hidden.double() @ weight.double().T
    best = logits.topk(2, dim=-1).values
    is_clear = best[:, 0] - best[:, 1] > MARGIN[dtype]
    assert is_clear.float().mean() > 0.98
    assert torch.equal(index[is_clear], logits.argmax(-1)[is_clear])
    # tensor cores cut off what they add, H / 16 = 32 times by up to 2^-23: 4e-6
    torch.testing.assert_close(largest.double(), best[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "width"),
    [(3, 1, 8), (5, 32_001, 72), (129, 777, 500), (129, 5000, 4504)],  # the last by the library
)
@pytest.mark.parametrize("dtype", MARGIN, ids=str)
def test_odd_sizes_with_ties(rows, vocab_size, width, dtype):
    """Small integers: logits are exact, and ties are everywhere."""
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    hidden = torch.randint(-1, 2, (rows, width), **options).to(dtype)
    weight = torch.randint(-1, 2, (vocab_size, width), **options).to(dtype)
    index = linear_argmax(hidden, weight, backend="triton")
    assert torch.equal(index, (hidden.double() @ weight.double().T).argmax(-1))


@pytest.mark.parametrize("rows", [4, 300])
def test_nan_and_infinity(rows):
    hidden, weight = make_inputs(rows, 5000, 64)
    hidden = hidden.abs() + 0.1
    weight[4000], weight[100] = torch.nan, torch.inf
    index, largest = linear_argmax(hidden, weight, return_max=True, backend="triton")
    assert (index == 4000).all() and largest.isnan().all()
    weight[4000] = 0.0
    assert (linear_argmax(hidden, weight, backend="triton") == 100).all()
    weight[:] = -torch.inf
    assert (linear_argmax(hidden, weight, backend="triton") == 0).all()


def test_a_captured_graph_and_memory():
    hidden, weight = make_inputs(800)
    expected = linear_argmax(hidden, weight, backend="triton")  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_argmax(hidden, weight, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2 << 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index = linear_argmax(hidden, weight, backend="triton")
    hidden.copy_(hidden.flip(0))
    graph.replay()
    assert torch.equal(index, expected.flip(0))


def test_offsets_beyond_32_bits():
    vocab_size, width = 600_000, 4096
    hidden, weight = make_inputs(3, vocab_size, width)
    weight[vocab_size - 1] = 10 * hidden[1]
    assert linear_argmax(hidden, weight, backend="triton")[1] == vocab_size - 1
