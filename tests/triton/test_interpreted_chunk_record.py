"""The kernels of the record and the state: the same numbers, one launch."""

import pytest
import torch
from model_cases import Launches
from record_cases import CASES, STATE, state_after
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_kernels import advance_state, chunk_record
from calm_kernels.chunk_record import kernels


@pytest.mark.parametrize("name", CASES)
def test_one_launch_writes_the_record(name, monkeypatch):
    arguments, expected = CASES[name]
    launches = Launches(monkeypatch, kernels)
    record = chunk_record(**arguments, backend="triton")
    assert record.dtype == torch.int64 and record.tolist() == expected
    assert launches.names == ["record_kernel"] * bool(expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert chunk_record(**arguments, backend="triton").shape == record.shape


def test_rows_of_any_strides():
    tokens = torch.arange(12).view(3, 4).T[:2]
    values = torch.zeros(4, 6, 5).permute(1, 2, 0)[:, 1:3]
    values[5, 1, 3] = float("nan")
    record = chunk_record(tokens, values, backend="triton")
    assert torch.equal(record, chunk_record(tokens, values, backend="torch"))
    assert record[:, -2].tolist() == [1, 0]


@pytest.mark.parametrize("has_lengths", [True, False])
def test_one_launch_moves_the_state_on(has_lengths, monkeypatch):
    """Contiguous, and in memory with gaps."""
    launches = Launches(monkeypatch, kernels)
    plain = [tensor.clone() for tensor in STATE]
    gaps = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in STATE]
    for record, *state in (plain, gaps):
        state[2] = state[2] if has_lengths else None
        advance_state(record, *state, backend="triton")
        found = [tensor.tolist() for tensor in state if tensor is not None]
        assert found == state_after(has_lengths)
    assert launches.names == ["advance_kernel"] * 2
    advance_state(*(tensor[:0] for tensor in plain), backend="triton")
    assert len(launches.names) == 2
