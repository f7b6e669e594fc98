"""The record of a chunk on the device: the numbers of torch, one draw and a vote."""

import pytest
import torch

from calm_kernels import chunk_record


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 200), (64, 200)])
def test_the_record_of_torch(batch, count):
    torch.manual_seed(count)
    values = torch.randn(batch, count, 128, device="cuda").bfloat16()
    values[-1, -1, -1] = float("inf")
    values = values.transpose(0, 1)
    tokens = torch.randint(2**40, (batch, 4), device="cuda")
    for agreeing in (1, tokens[:, 0].contiguous()):
        options = {"num_agreeing": agreeing, "draws": count}
        record = chunk_record(tokens, values, **options, backend="triton")
        assert torch.equal(record, chunk_record(tokens, values, **options, backend="torch"))
    answer = torch.isfinite(values).all(-1).all(0)
    record = chunk_record(tokens, answer, is_fallback=~answer, saved=3, backend="triton")
    assert record[:, 4:].tolist() == [[1, 1, int(not x), int(x), 3] for x in answer.tolist()]
