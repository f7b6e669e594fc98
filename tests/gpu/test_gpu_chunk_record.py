"""The record of a chunk on the device: the numbers of torch, one draw and a vote."""

import pytest
import torch

from calm_kernels import advance_state, chunk_record


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


@pytest.mark.parametrize("batch", [1, 64])
def test_the_state_of_torch(batch):
    torch.manual_seed(batch)
    sizes = ((batch, 9), (batch, 4), (batch, 2), (batch,))
    record, *state = (torch.randint(2**40, size, device="cuda") for size in sizes)
    for lengths in (state[2], None):
        ours, theirs = ([x.clone() for x in state[:2]] for _ in range(2))
        counts = [None if lengths is None else lengths.clone() for _ in range(2)]
        advance_state(record, *ours, counts[0], backend="triton")
        advance_state(record, *theirs, counts[1], backend="torch")
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
        assert lengths is None or torch.equal(*counts)
