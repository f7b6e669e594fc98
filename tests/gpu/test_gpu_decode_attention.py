"""Attention of a decode step at full size: parity, columns that are not filled, replays."""

import pytest
import torch
from gpu_cases import relative_error

from calm_kernels import decode_attention

TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
# sequences, key heads, heads a key, D, capacity, columns filled by the first sequence
SIZES = [
    (1, 16, 1, 64, 512, 511), (4, 16, 1, 64, 512, 300), (64, 16, 1, 64, 512, 511),
    (1, 12, 1, 48, 2048, 2000), (2, 8, 4, 128, 1024, 77), (3, 2, 20, 256, 200, 199),
    (1, 1, 1, 64, 64, 0),
]  # fmt: skip


def make_inputs(size, dtype):
    """What is not filled is NaN; each sequence is a column shorter than the one before it."""
    batch, kv_heads, group, width, capacity, longest = size
    torch.manual_seed(longest)
    keys, values = torch.randn(2, batch, kv_heads, capacity, width, device="cuda")
    lengths = (longest - torch.arange(batch, device="cuda")).clamp(min=0)
    for sequence, length in enumerate(lengths.tolist()):
        keys[sequence, :, length:] = values[sequence, :, length:] = torch.nan
    rows = torch.randn(batch, (group + 2) * kv_heads * width, device="cuda")
    angles = torch.randn(capacity, width // 2, device="cuda")
    cast = [tensor.to(dtype) for tensor in (rows, keys, values)]
    return *cast, torch.polar(torch.ones_like(angles), angles), lengths


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity_at_full_size(size, dtype):
    rows, keys, values, rotations, lengths = make_inputs(size, dtype)
    exact = [tensor.double() for tensor in (rows, keys, values)]
    truth = decode_attention(*exact, rotations.cdouble(), lengths, backend="reference")
    actual = decode_attention(rows, keys, values, rotations, lengths, backend="triton")
    assert relative_error(actual, truth) < TOLERANCE[dtype]
    for cache, wanted in ((keys, exact[1]), (values, exact[2])):
        assert torch.equal(cache.isnan(), wanted.isnan())
        assert relative_error(cache.nan_to_num(), wanted.nan_to_num()) < TOLERANCE[dtype]
    again = decode_attention(rows, keys, values, rotations, lengths, backend="triton")
    assert torch.equal(again, actual)


def test_replays_follow_the_lengths_and_leave_the_counts_at_zero():
    rows, keys, values, rotations, lengths = make_inputs((1, 16, 1, 64, 512, 40), torch.float32)
    arrivals = torch.zeros(16, dtype=torch.int32, device="cuda")

    def step():
        return decode_attention(
            rows, keys, values, rotations, lengths, arrivals=arrivals, backend="triton"
        )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in (40, 41, 42) * 20:
        lengths.fill_(length)
        graph.replay()
        exact = decode_attention(
            rows, keys.clone(), values.clone(), rotations, lengths, backend="reference"
        )
        assert relative_error(out, exact) < 1e-5 and not arrivals.any()
