"""The record of a chunk, in every backend."""

import pytest
import torch
from record_cases import CASES

from calm_kernels import chunk_record


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
