"""The record of a chunk, in every backend."""

import pytest
import torch
from record_cases import CASES, STATE, state_after

from calm_kernels import advance_state, chunk_record


@pytest.mark.parametrize("name", CASES)
def test_records(name, backend):
    arguments, expected = CASES[name]
    record = chunk_record(**arguments, backend=backend)
    assert record.dtype == torch.int64 and record.tolist() == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must have dtype int64"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "with K >= 1"),
        ({"values": torch.zeros(2, 4)}, ValueError, r"values must have shape \[N, 2, L\]"),
        ({"values": torch.zeros(1, 3, 4)}, ValueError, r"got \(1, 3, 4\)"),
        ({"values": torch.ones(3).bool()}, ValueError, r"values must have shape \(2,\)"),
        ({"draws": 1.5}, TypeError, "draws must be a whole number or a tensor, got 1.5"),
        ({"draws": True}, TypeError, "draws must be a whole number or a tensor, got True"),
        ({"draws": 2**63}, ValueError, "draws must fit into 64 bits, got 9223372036854775808"),
        ({"is_fallback": 1}, TypeError, "is_fallback must be a bool or a tensor, got 1"),
        ({"saved": torch.zeros(3, dtype=torch.int64)}, ValueError, r"saved must have shape \(2,\)"),
        ({"is_fallback": torch.zeros(2)}, TypeError, "is_fallback must have dtype bool"),
    ],
)
def test_bad_input(change, error, message, backend):
    arguments = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "values": torch.zeros(1, 2, 4)}
    with pytest.raises(error, match=message):
        chunk_record(**arguments | change, backend=backend)


@pytest.mark.parametrize("has_lengths", [True, False])
def test_the_state_moves_on_in_place(has_lengths, backend):
    record, *state = (tensor.clone() for tensor in STATE)
    state[2] = state[2] if has_lengths else None
    advance_state(record, *state, backend=backend)
    assert [tensor.tolist() for tensor in state if tensor is not None] == state_after(has_lengths)
    assert torch.equal(record, STATE[0])


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2), ValueError, "record must have at least 2 dimensions"),
        (0, torch.zeros(2, 8), TypeError, "record must have dtype int64"),
        (1, torch.zeros(2, 4).long(), ValueError, r"tokens must have shape \(2, 3\)"),
        (2, torch.zeros(3, 2).long(), ValueError, r"seed must have shape \(2, 2\)"),
        (3, torch.zeros(2), TypeError, "lengths must have dtype int64"),
    ],
)
def test_a_state_that_does_not_fit(index, value, error, message, backend):
    arguments = [tensor.clone() for tensor in STATE]
    arguments[index] = value
    with pytest.raises(error, match=message):
        advance_state(*arguments, backend=backend)
